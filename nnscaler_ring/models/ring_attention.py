"""`RingAttention`: multi-head attention over a sequence that a ring of devices shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from nnscaler_ring.core.ranks.agreement import refusing_together
from nnscaler_ring.core.ranks.groups import group_string
from nnscaler_ring.core.ranks.kept_group import kept_group
from nnscaler_ring.core.ranks.ring_size import check_ring_size
from nnscaler_ring.models.heads import to_heads
from nnscaler_ring.models.local_ring import local_ring_attention
from nnscaler_ring.ring_attn import wrap_ring_attn_func

if TYPE_CHECKING:
    from nnscaler_ring.core.ranks.groups import ProcessGroupLike


class RingAttention(nn.Module):
    """Multi-head attention with the four projections, no biases and no positions.

    On one device it is causal attention, whatever `ring_size`. Under torchrun every rank passes and
    gets its shard. Inside nnScaler's `parallelize()` leave `ring_size` and `process_group` out.

    Args:
        d_model: channels of the input and of the result.
        n_heads: divides d_model.
        ring_size: with a group its size, or None. Without one the number of chunks that attention
            is computed in, in the order of a ring; None is 1.
        segment_size: tokens per device of the ring, or per chunk: `segment_size * ring_size` must
            then be the length of the sequence. None: any length, divisible or not.
        causal: a token sees no later one.
        dropout_p: dropout of attention probabilities, while training.
        exchange: see `wrap_ring_attn_func`.
        process_group: None, or the ranks that share the sequence, in block order.

    Raises:
        ValueError: an argument is wrong, or does not fit the group.

    Source: Liu et al., "Ring Attention with Blockwise Transformers", arXiv 2310.01889.
    """

    process_group = kept_group()

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        ring_size: int | None = None,
        segment_size: int | None = None,
        causal: bool = True,
        *,
        dropout_p: float = 0.0,
        exchange: str = "direct",
        process_group: ProcessGroupLike | None = None,
    ) -> None:
        super().__init__()
        if d_model < 1 or n_heads < 1 or d_model % n_heads:
            raise ValueError(
                f"n_heads must divide d_model, got n_heads={n_heads} and d_model={d_model}; "
                "choose a d_model that is a multiple of n_heads."
            )
        if segment_size is not None and segment_size < 1:
            raise ValueError(f"segment_size must be at least 1 or None, got {segment_size}.")
        self.n_heads, self.causal, self.segment_size = n_heads, causal, segment_size
        self.dropout_p, self.exchange, self.process_group = dropout_p, exchange, process_group
        self.ring_size = check_ring_size("ring_size", ring_size, process_group)
        self.w_q = nn.Linear(d_model, d_model, bias=False)
        self.w_k = nn.Linear(d_model, d_model, bias=False)
        self.w_v = nn.Linear(d_model, d_model, bias=False)
        self.w_o = nn.Linear(d_model, d_model, bias=False)

    @property
    def chunks(self) -> int:
        """The number of parts that this device computes, in the order of a ring."""
        return self.ring_size if self.process_group is None else 1

    def forward(self, x: Tensor, shard_lens: Sequence[int] | None = None) -> Tensor:
        """x [batch, tokens, d_model] -> [batch, tokens, d_model].

        Args:
            x: the whole sequence, or with a group this rank's shard of it.
            shard_lens: tokens of every block, in block order, where they differ.

        Raises:
            ValueError: `segment_size` does not fit the length; or as `wrap_ring_attn_func`.
        """
        if self.segment_size is not None and x.shape[1] != self.segment_size * self.chunks:
            self._refuse_length(x.shape[1], self.segment_size)
        q, k, v = (to_heads(x, linear, self.n_heads) for linear in (self.w_q, self.w_k, self.w_v))
        dropout_p = self.dropout_p if self.training else 0.0
        out: Any
        if self.chunks > 1:
            out = local_ring_attention(
                q, k, v, chunks=self.chunks, causal=self.causal, dropout_p=dropout_p
            )
        else:
            out = wrap_ring_attn_func(
                q,
                k,
                v,
                dropout_p=dropout_p,
                causal=self.causal,
                process_group=self.process_group,
                shard_lens=shard_lens,
                exchange=self.exchange,
            )
        return self.w_o(out.flatten(2))

    def _refuse_length(self, tokens: int, segment_size: int) -> None:
        """Raise on every rank, if on one."""
        with refusing_together(group_string(self.process_group), "RingAttention"):
            raise ValueError(
                f"segment_size * ring_size = {segment_size} * {self.ring_size} must be the length "
                f"of the sequence: this device must hold {segment_size * self.chunks} tokens, got "
                f"{tokens}; leave segment_size out for any length."
            )
