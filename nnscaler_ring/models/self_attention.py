"""Causal self-attention of a decoder: grouped heads and rotary positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from nnscaler_ring.core.ranks.kept_group import kept_group
from nnscaler_ring.core.ranks.ring_size import check_ring_size
from nnscaler_ring.models.heads import to_heads
from nnscaler_ring.models.local_ring import local_ring_attention
from nnscaler_ring.models.rope import Rotation, rotate
from nnscaler_ring.ring_attn import wrap_ring_attn_func
from nnscaler_ring.zigzag_attn import wrap_zigzag_attn_func

if TYPE_CHECKING:
    from nnscaler_ring.core.ranks.groups import ProcessGroupLike

LAYOUTS = ("contiguous", "zigzag")
"""What a rank holds of a sequence, as in `wrap_zigzag_attn_func`: a contiguous shard, or the two
chunks of zigzag, in order."""


class SelfAttention(nn.Module):
    """Causal grouped-query attention with RoPE, without biases.

    Args:
        width: channels of the input and of the result.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides num_heads.
        head_dim: channels of a head; even.
        layout: what the caller holds, one of `LAYOUTS`.
        balanced: whether every rank computes as much as the others. True with contiguous shards:
            attention moves rows to zigzag and back (`wrap_zigzag_attn_func`); False: no row of q
            moves, and the last rank works longest (`wrap_ring_attn_func`). None: True. Zigzag
            chunks are balanced as they are: there it must be given, as True.
        window: keys that a query sees before itself, in tokens; None is all.
        dropout_p: dropout of attention probabilities, while training.
        ring_size: with a group its size, or None. Without one the number of chunks that attention
            is computed in, in the order of a ring; None is 1.
        process_group: None, or the ranks that share the sequence, in block order.

    Source: Ainslie et al., "GQA", arXiv 2305.13245.
    """

    process_group = kept_group()

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        layout: str = "contiguous",
        balanced: bool | None = None,
        window: int | None = None,
        dropout_p: float = 0.0,
        exchange: str = "direct",
        ring_size: int | None = None,
        process_group: ProcessGroupLike | None = None,
    ) -> None:
        super().__init__()
        self.balanced = check_layout(layout, balanced)
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads, {num_heads}, got {num_kv_heads}."
            )
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, got {head_dim}.")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.layout, self.window, self.dropout_p = layout, window, dropout_p
        self.exchange, self.process_group = exchange, process_group
        self.ring_size = check_ring_size("ring_size", ring_size, process_group)
        self.to_q = nn.Linear(width, num_heads * head_dim, bias=False)
        self.to_k = nn.Linear(width, num_kv_heads * head_dim, bias=False)
        self.to_v = nn.Linear(width, num_kv_heads * head_dim, bias=False)
        self.from_heads = nn.Linear(num_heads * head_dim, width, bias=False)

    def forward(
        self, x: Tensor, rotation: Rotation, shard_lens: Sequence[int] | None = None
    ) -> Tensor:
        """x [batch, tokens, width] of this rank -> the same shape.

        Args:
            rotation: `rope_rotation` at the tokens' positions in the whole sequence.
            shard_lens: tokens that each block holds, where they differ.
        """
        q = rotate(to_heads(x, self.to_q, self.num_heads), rotation)
        k = rotate(to_heads(x, self.to_k, self.num_kv_heads), rotation)
        v = to_heads(x, self.to_v, self.num_kv_heads)
        return self.from_heads(self._attend(q, k, v, shard_lens).flatten(2))

    @property
    def chunks(self) -> int:
        """The number of parts that this device computes, in the order of a ring."""
        return self.ring_size if self.process_group is None else 1

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, shard_lens: Sequence[int] | None) -> Any:
        dropout_p = self.dropout_p if self.training else 0.0
        if self.chunks > 1:
            return local_ring_attention(
                q, k, v, chunks=self.chunks, window=self.window, dropout_p=dropout_p
            )
        options: dict[str, Any] = {
            "dropout_p": dropout_p,
            "window_size": (-1 if self.window is None else self.window, 0),
            "process_group": self.process_group,
            "shard_lens": shard_lens,
            "exchange": self.exchange,
        }
        # Two calls, each by name: nnScaler finds ops by name.
        if not self.balanced:
            return wrap_ring_attn_func(q, k, v, **options)
        return wrap_zigzag_attn_func(q, k, v, layout=self.layout, **options)


def check_layout(layout: str, balanced: bool | None) -> bool:
    """Say whether the work of ranks is balanced.

    Raises:
        ValueError: a layout that is not one of `LAYOUTS`, or one that meant something else before.
    """
    if layout == "zigzag order":
        raise ValueError(
            "layout must be what the caller holds, got 'zigzag order'; zigzag chunks are now "
            "layout='zigzag', balanced=True."
        )
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}.")
    if layout == "zigzag" and balanced is not True:
        # Before, this word meant contiguous shards, and zigzag chunks would be taken for them.
        raise ValueError(
            f"balanced must be True with layout='zigzag', got {balanced}: the word says that the "
            "caller holds zigzag chunks, as in wrap_zigzag_attn_func; for contiguous shards whose "
            "work is balanced leave both out."
        )
    return balanced is not False
