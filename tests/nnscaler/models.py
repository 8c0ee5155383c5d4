"""Models that nnScaler traces; it needs their source, so they live in a module."""

from typing import Any

import torch
from torch import Tensor, nn

import nnscaler_ring
from nnscaler_ring import wrap_ring_attn_func
from nnscaler_ring.ring_attn_varlen import wrap_ring_attn_varlen_func as varlen


class OneCall(nn.Module):
    """One call of an op, found in the three ways that users write."""

    def __init__(self, op: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.op = op
        self.options = options

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor | None = None,
        cu_k: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if self.op == "ring":
            return wrap_ring_attn_func(q, k, v, **self.options)
        if self.op == "zigzag":
            return nnscaler_ring.wrap_zigzag_attn_func(q, k, v, **self.options)
        return varlen(q, k, v, cu_q, cu_k, **self.options)


class Config:
    """Sizes of the test transformer."""

    vocabulary = 32
    layers = 2
    width = 16
    num_heads = 4
    num_kv_heads = 2
    head_dim = 4
    hidden = 24
    tokens = 16


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = op
        self.to_q = nn.Linear(Config.width, Config.num_heads * Config.head_dim, bias=False)
        self.to_k = nn.Linear(Config.width, Config.num_kv_heads * Config.head_dim, bias=False)
        self.to_v = nn.Linear(Config.width, Config.num_kv_heads * Config.head_dim, bias=False)
        self.to_out = nn.Linear(Config.num_heads * Config.head_dim, Config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = split_heads(self.to_q(x), Config.num_heads)
        k = split_heads(self.to_k(x), Config.num_kv_heads)
        v = split_heads(self.to_v(x), Config.num_kv_heads)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.op == "zigzag":
            out = nnscaler_ring.wrap_zigzag_attn_func(q, k, v)
        else:
            out = wrap_ring_attn_func(q, k, v)
        return self.to_out(out.flatten(2))


def split_heads(x: Tensor, heads: int) -> Tensor:
    # Sizes from the configuration: reading x.shape would gather the activation.
    return x.view(-1, Config.tokens, heads, Config.head_dim)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=3)  # nnScaler takes no negative dim here
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=3)


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(Config.width, Config.hidden, bias=False)
        self.up = nn.Linear(Config.width, Config.hidden, bias=False)
        self.down = nn.Linear(Config.hidden, Config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, op: str) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(Config.width)
        self.attention = Attention(op)
        self.mlp_norm = RMSNorm(Config.width)
        self.mlp = SwiGLU()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Two layers, GQA, rotary positions, SwiGLU; the loss is a sum over tokens."""

    def __init__(self, op: str = "ring") -> None:
        super().__init__()
        self.embedding = nn.Embedding(Config.vocabulary, Config.width)
        self.blocks = nn.ModuleList(Block(op) for _ in range(Config.layers))
        self.norm = RMSNorm(Config.width)
        self.head = nn.Linear(Config.width, Config.vocabulary, bias=False)
        angles = torch.arange(Config.tokens)[:, None] / 10.0 ** torch.arange(Config.head_dim // 2)
        self.register_buffer("cos", angles.cos()[None, :, None])
        self.register_buffer("sin", angles.sin()[None, :, None])

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        log_probabilities = nn.functional.log_softmax(self.head(self.norm(x)), dim=-1)
        # Per token, then summed: cross_entropy with "mean" would gather the logits.
        losses = nn.functional.nll_loss(log_probabilities.transpose(1, 2), labels, reduction="none")
        return losses.sum()


class BadCall(nn.Module):
    """A call that nnScaler must not take."""

    def __init__(self, mistake: str) -> None:
        super().__init__()
        self.mistake = mistake

    def forward(self, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        if self.mistake == "process_group":
            return wrap_ring_attn_func(q, k, v, process_group=[0, 1])
        if self.mistake == "shard_lens":
            return wrap_ring_attn_func(q, k, v, shard_lens=[8, 16])
        if self.mistake == "alibi_slopes by position":
            return wrap_ring_attn_func(q, k, v, None, 0.0, True, (-1, -1), slopes)
        if self.mistake == "sinks by keyword":
            return wrap_ring_attn_func(q, k, v, sinks=slopes)
        if self.mistake == "bias in a packed call":
            cu_seqlens = slopes.to(torch.int32)
            return varlen(q[0], k[0], v[0], cu_seqlens, cu_seqlens, slopes)
        if self.mistake == "window":
            return wrap_ring_attn_func(q, k, v, window_size=(-3, 0))
        if self.mistake == "packed totals":
            cu_seqlens = slopes.to(torch.int32)
            return varlen(q[0], k[0, 4:], v[0, 4:], cu_seqlens, cu_seqlens)
        if self.mistake == "zigzag order":
            return nnscaler_ring.wrap_zigzag_attn_func(q, k, v, layout="zigzag")
        return wrap_ring_attn_func(q, k, v)


class TwoCalls(nn.Module):
    """Two calls on the same q, which the emission must tell apart."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return wrap_ring_attn_func(q, k, v) + wrap_ring_attn_func(q, v, k, causal=False)
