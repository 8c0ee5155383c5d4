"""A small byte-level decoder that knows nothing of ranks: attention and positions are given to it.

Everything but attention works on each token by itself, so a rank may hold any tokens of a
sequence, in any order, as long as it says where they stand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [s, h, d], k [s, h_kv, d], v [s, h_kv, d]) of this rank's tokens -> out [s, h, d]."""


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
    """Bytes in, logits of each next byte out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.num_bytes, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.num_bytes, bias=False)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)

    def forward(self, inputs: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Logits [s, 256] of the tokens that this rank holds.

        Args:
            inputs: int64 [s], this rank's bytes.
            positions: int64 [s], where they stand in the whole sequence or document.
            attention: attention to all tokens of the sequence, wherever they are.
        """
        x = self.embedding(inputs)
        rotation = rope_rotation(positions, self.config, x.dtype)
        for layer in self.layers:
            x = layer(x, rotation, attention)
        return self.head(self.norm(x))


class Layer(nn.Module):
    """Attention, then a gated feed-forward network, each on the normalised residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        q_width = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.attention_norm = nn.RMSNorm(config.width)
        self.to_q = nn.Linear(config.width, q_width, bias=False)
        self.to_k = nn.Linear(config.width, kv_width, bias=False)
        self.to_v = nn.Linear(config.width, kv_width, bias=False)
        self.from_heads = nn.Linear(q_width, config.width, bias=False)
        self.feed_forward_norm = nn.RMSNorm(config.width)
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, attention: Attention) -> Tensor:
        """x [s, width] -> [s, width]."""
        normed = self.attention_norm(x)
        q, k, v = (
            project(normed).unflatten(-1, (-1, self.head_dim))
            for project in (self.to_q, self.to_k, self.to_v)
        )
        out = attention(rotate(q, rotation), rotate(k, rotation), v)
        x = x + self.from_heads(out.flatten(-2))
        normed = self.feed_forward_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


def rope_rotation(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> Tensor:
    """(cos, sin) of the angles by which RoPE turns each pair of channels: [2, s, 1, d / 2].

    Source: Su et al., "RoFormer", arXiv 2104.09864.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim
    # In float64, so that a large position keeps its fraction of a turn.
    angles = positions.double().unsqueeze(1) * config.rope_base ** -exponents.double()
    return torch.stack((angles.cos(), angles.sin())).unsqueeze(2).to(dtype)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x [s, h, d] with channel n and n + d / 2 turned as a pair."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
