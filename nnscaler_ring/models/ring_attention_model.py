"""`RingAttentionModel`: blocks of ring attention; the last timestep's vector is the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from nnscaler_ring.core.ranks.agreement import refusing_together
from nnscaler_ring.core.ranks.groups import group_string
from nnscaler_ring.core.ranks.kept_group import kept_group
from nnscaler_ring.core.ranks.ring_size import check_ring_size
from nnscaler_ring.models.heads import to_heads
from nnscaler_ring.models.last_token import last_token
from nnscaler_ring.models.local_ring import local_ring_attention
from nnscaler_ring.ring_attn import wrap_ring_attn_func

if TYPE_CHECKING:
    from nnscaler_ring.core.ranks.groups import ProcessGroupLike

DEFAULT_CHUNKS = 4
HIDDEN_SIZE = 256


class RingAttentionModel(nn.Module):
    """Takes a sequence and returns the last timestep's hidden vector. `build` makes one.

    Input projection (only where embed_dim is not hidden_size), then blocks of causal ring attention
    and a GELU network of four times the width, pre-norm, with biases, dropout after each branch and
    between blocks; a final LayerNorm; the last timestep. There is no positional encoding.

    Source: Liu et al., arXiv 2310.01889. Structure and defaults are those of
    `Edifice.Attention.RingAttention` (docs/origins.md).
    """

    process_group = kept_group()

    def __init__(
        self,
        *,
        embed_dim: int,
        hidden_size: int,
        num_heads: int,
        num_chunks: int | None,
        num_layers: int,
        dropout: float,
        window_size: int,
        process_group: ProcessGroupLike | None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("embed_dim", embed_dim),
            ("hidden_size", hidden_size),
            ("num_heads", num_heads),
            ("num_layers", num_layers),
            ("window_size", window_size),
        ):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}.")
        if hidden_size % num_heads:
            raise ValueError(f"num_heads must divide hidden_size, {hidden_size}, got {num_heads}.")
        if num_chunks is None and process_group is None:
            num_chunks = min(DEFAULT_CHUNKS, window_size)
        ring_size = check_ring_size("num_chunks", num_chunks, process_group)
        if ring_size > window_size:
            raise ValueError(
                f"num_chunks must not exceed window_size, {window_size}, got {ring_size}."
            )
        self.window_size, self.process_group = window_size, process_group
        self.ranks = 1 if process_group is None else ring_size
        self.input_projection: nn.Module = nn.Identity()
        if embed_dim != hidden_size:
            self.input_projection = nn.Linear(embed_dim, hidden_size)
            init_dense(self.input_projection)
        self.blocks = nn.ModuleList(
            _Block(hidden_size, num_heads, dropout, ring_size, process_group)
            for _ in range(num_layers)
        )
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(hidden_size)

    @classmethod
    def build(
        cls,
        *,
        embed_dim: int,
        hidden_size: int = HIDDEN_SIZE,
        num_heads: int = 4,
        num_chunks: int | None = None,
        num_layers: int = 4,
        dropout: float = 0.1,
        window_size: int = 60,
        process_group: ProcessGroupLike | None = None,
    ) -> RingAttentionModel:
        """Make the model.

        Args:
            embed_dim: channels of the input.
            hidden_size: channels of the model and of the result.
            num_heads: divides hidden_size.
            num_chunks: parts of the sequence, in the order of a ring; the result is the same for
                every number. None: 4 on one device, with a group its size. Pass 1 for nnScaler's
                `parallelize()`, which shards the sequence itself and gathers it for chunks.
            num_layers: blocks.
            dropout: after each branch and between blocks, while training.
            window_size: the length of the sequence in timesteps; need not divide.
            process_group: None, or the ranks that share the sequence, in block order.

        Raises:
            ValueError: an argument is wrong, or does not fit the group.
        """
        return cls(
            embed_dim=embed_dim,
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_chunks=num_chunks,
            num_layers=num_layers,
            dropout=dropout,
            window_size=window_size,
            process_group=process_group,
        )

    @staticmethod
    def output_size(**opts: Any) -> int:
        """The number of channels in the result of `build(**opts)`."""
        return int(opts.get("hidden_size", HIDDEN_SIZE))

    def forward(self, x: Tensor, shard_lens: Sequence[int] | None = None) -> Tensor:
        """x [batch, window_size, embed_dim] -> [batch, hidden_size] of the last timestep.

        Args:
            x: the whole sequence, or with a group this rank's contiguous shard; the result is on
                every rank, see `last_token` for its gradient.
            shard_lens: timesteps of every block, in block order, where they differ.

        Raises:
            ValueError: the sequence is not `window_size` long.
        """
        total = sum(shard_lens) if shard_lens else x.shape[1] * self.ranks
        if total != self.window_size:
            self._refuse_length(total)
        x = self.input_projection(x)
        for number, block in enumerate(self.blocks):
            x = block(self.dropout(x) if number else x, shard_lens)
        x = self.norm(x)
        if self.process_group is None:
            return x[:, -1]
        return last_token(x, self.process_group, shard_lens)

    def _refuse_length(self, total: int) -> None:
        """Raise on every rank, if on one."""
        with refusing_together(group_string(self.process_group), "RingAttentionModel"):
            raise ValueError(
                f"window_size must be the length of the sequence, {total}, got "
                f"{self.window_size}; build the model with window_size={total}."
            )


class _Block(nn.Module):
    """One ring attention block; q, k and v come from one projection."""

    process_group = kept_group()

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        dropout: float,
        chunks: int,
        process_group: ProcessGroupLike | None,
    ) -> None:
        super().__init__()
        self.num_heads, self.chunks, self.process_group = num_heads, chunks, process_group
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.feed_forward_norm = nn.LayerNorm(hidden_size)
        self.up = nn.Linear(hidden_size, 4 * hidden_size)
        self.down = nn.Linear(4 * hidden_size, hidden_size)
        self.gelu = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        for linear in (self.qkv, self.out_proj, self.up, self.down):
            init_dense(linear)

    def forward(self, x: Tensor, shard_lens: Sequence[int] | None = None) -> Tensor:
        """x [batch, tokens, hidden_size] -> the same shape."""
        qkv = to_heads(self.attention_norm(x), self.qkv, 3 * self.num_heads)
        q, k, v = qkv.chunk(3, dim=2)
        out: Any
        if self.process_group is None and self.chunks > 1:
            out = local_ring_attention(q, k, v, chunks=self.chunks)
        else:
            out = wrap_ring_attn_func(
                q, k, v, process_group=self.process_group, shard_lens=shard_lens
            )
        x = x + self.dropout(self.out_proj(out.flatten(2)))
        hidden = self.gelu(self.up(self.feed_forward_norm(x)))
        return x + self.dropout(self.down(hidden))


def init_dense(linear: nn.Linear) -> None:
    """Set Glorot uniform weights and zero biases."""
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
