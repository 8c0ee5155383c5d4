"""A small byte-level decoder that knows nothing of ranks: attention and positions are given to it.

Everything but attention works on each token by itself, so a rank may hold any tokens of a
sequence, in any order, as long as it says where they stand. It is written with operations that
nnScaler can partition along the tokens: see the traps in docs/nnscaler.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from nnscaler_ring.models.rms_norm import RMSNorm
from nnscaler_ring.models.rope import Rotation, rope_rotation, rotate
from nnscaler_ring.models.swiglu import SwiGLU

Attention = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""(q [b, s, h, d], k and v [b, s, h_kv, d] of this rank's tokens, cu_seqlens) -> [b, s, h, d]."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes: small enough for a laptop, grouped-query attention as in current models."""

    num_bytes: int = 256  # the vocabulary: every byte is a token
    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    hidden: int = 384  # of SwiGLU: 3 * width
    rope_base: float = 10_000.0


class Decoder(nn.Module):
    """Bytes in, the loss of each next byte out, summed.

    Args:
        attention: attention to all tokens of the sequence, wherever they are.
    """

    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.num_bytes, config.width)
        self.layers = nn.ModuleList(Layer(config, attention) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.num_bytes, bias=False)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)

    def forward(
        self, inputs: Tensor, positions: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Sum of the losses of the tokens that this rank holds, in nats.

        Args:
            inputs: int64 [b, s], this rank's bytes.
            positions: int64 [b, s], where they stand in the whole sequence or document.
            targets: int64 [b, s], the bytes that follow them.
            cu_seqlens: for the attention, where it packs documents.
        """
        log_probabilities = F.log_softmax(self.logits(inputs, positions, cu_seqlens), dim=-1)
        # One loss per token, then their sum: other reductions make nnScaler gather.
        return F.nll_loss(log_probabilities.transpose(1, 2), targets, reduction="none").sum()

    def logits(self, inputs: Tensor, positions: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Logits [b, s, 256] of each next byte."""
        x = self.embedding(inputs)
        rotation = rope_rotation(positions, self.config.head_dim, x.dtype, self.config.rope_base)
        for layer in self.layers:
            x = layer(x, inputs.size(0), rotation, cu_seqlens)
        return self.head(self.norm(x))


class Layer(nn.Module):
    """Attention, then a gated feed-forward network, each on the normalised residual stream."""

    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__()
        q_width = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self.config, self.attention = config, attention
        self.attention_norm = RMSNorm(config.width)
        self.to_q = nn.Linear(config.width, q_width, bias=False)
        self.to_k = nn.Linear(config.width, kv_width, bias=False)
        self.to_v = nn.Linear(config.width, kv_width, bias=False)
        self.from_heads = nn.Linear(q_width, config.width, bias=False)
        self.feed_forward_norm = RMSNorm(config.width)
        self.feed_forward = SwiGLU(config.width, config.hidden)

    def forward(
        self, x: Tensor, batch: int, rotation: Rotation, cu_seqlens: Tensor | None
    ) -> Tensor:
        """x [b, s, width] -> [b, s, width]."""
        config = self.config  # sizes come from it and from `batch`: nnScaler gathers for x.shape
        normed = self.attention_norm(x)
        q = self.to_q(normed).view(batch, -1, config.num_heads, config.head_dim)
        k = self.to_k(normed).view(batch, -1, config.num_kv_heads, config.head_dim)
        v = self.to_v(normed).view(batch, -1, config.num_kv_heads, config.head_dim)
        out = self.attention(rotate(q, rotation), rotate(k, rotation), v, cu_seqlens)
        x = x + self.from_heads(out.flatten(2))
        return x + self.feed_forward(self.feed_forward_norm(x))
