"""One layer of a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from nnscaler_ring.models.rms_norm import RMSNorm
from nnscaler_ring.models.rope import Rotation
from nnscaler_ring.models.self_attention import SelfAttention
from nnscaler_ring.models.swiglu import SwiGLU


class DecoderLayer(nn.Module):
    """Applies self-attention, then SwiGLU, each on the normalised residual stream and added to it.

    Args:
        width: channels of the residual stream.
        hidden: channels inside SwiGLU.
        attention: the other arguments of `SelfAttention`.
    """

    def __init__(self, width: int, hidden: int, **attention: Any) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.attention = SelfAttention(width, **attention)
        self.feed_forward_norm = RMSNorm(width)
        self.feed_forward = SwiGLU(width, hidden)

    def forward(
        self, x: Tensor, rotation: Rotation, shard_lens: Sequence[int] | None = None
    ) -> Tensor:
        """Takes x [batch, tokens, width], returns the same shape; see `SelfAttention.forward`."""
        x = x + self.attention(self.attention_norm(x), rotation, shard_lens)
        return x + self.feed_forward(self.feed_forward_norm(x))
