"""`EnergyTransformerBlock`: pre-norm ring attention and a feed-forward network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from nnscaler_ring.models.ring_attention import RingAttention

if TYPE_CHECKING:
    from nnscaler_ring.core.ranks.groups import ProcessGroupLike


class EnergyTransformerBlock(nn.Module):
    """x += dropout(attention(norm(x))), then x += dropout(down(gelu(up(norm(x))))).

    Dropout draws from this process's generator: ranks that share a sequence should be seeded apart
    (`torch.manual_seed(seed + rank)`) so that their tokens get different masks.

    Args:
        d_model: channels.
        n_heads: divides d_model.
        d_ff: channels of the hidden layer.
        ring_size: see `RingAttention`, also for `segment_size`, `causal` and `process_group`.
        dropout_rate: of both branches before they are added, while training.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_ff: int,
        ring_size: int | None = None,
        dropout_rate: float = 0.1,
        *,
        segment_size: int | None = None,
        causal: bool = True,
        exchange: str = "direct",
        process_group: ProcessGroupLike | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = RingAttention(
            d_model,
            n_heads,
            ring_size,
            segment_size,
            causal,
            exchange=exchange,
            process_group=process_group,
        )
        self.feed_forward_norm = nn.LayerNorm(d_model)
        self.up = nn.Linear(d_model, d_ff)
        self.down = nn.Linear(d_ff, d_model)
        self.gelu = nn.GELU()
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, x: Tensor, shard_lens: Sequence[int] | None = None) -> Tensor:
        """x [batch, tokens, d_model] -> [batch, tokens, d_model]; see `RingAttention.forward`."""
        x = x + self.dropout(self.attention(self.attention_norm(x), shard_lens))
        hidden = self.gelu(self.up(self.feed_forward_norm(x)))
        return x + self.dropout(self.down(hidden))
