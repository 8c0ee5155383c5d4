"""Models that nnScaler traces; it needs their source, so they live in a module."""

from typing import Any

import torch
from torch import Tensor, nn

import nnscaler_ring
from nnscaler_ring import DropoutSeed, HeadOffsets, wrap_ring_attn_func
from nnscaler_ring.ring_attn_varlen import wrap_ring_attn_varlen_func as varlen
from nnscaler_ring.tools.demo.model import Decoder, ModelConfig
from nnscaler_ring.tools.demo.shard import Attention


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
        slopes: Tensor | None = None,
        bias: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if self.op == "varlen":
            # The bias by position, where nnScaler expects the tensors of an op.
            return varlen(
                q, k, v, cu_q, cu_k, bias, alibi_slopes=slopes, sinks=sinks, **self.options
            )
        options = {"alibi_slopes": slopes, "bias": bias, "sinks": sinks, **self.options}
        if self.op == "ring":
            return wrap_ring_attn_func(q, k, v, **options)
        return nnscaler_ring.wrap_zigzag_attn_func(q, k, v, **options)


CONFIG = ModelConfig(
    num_bytes=32, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, hidden=24
)
TOKENS = 16


def transformer(op: str = "ring") -> Decoder:
    """The demonstration's model: two layers, GQA, RoPE, SwiGLU; the loss is a sum over tokens."""
    return Decoder(CONFIG, Attention(op))


def arguments(ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What the transformer is called with, for token ids and labels [batch, tokens]."""
    return {"inputs": ids, "positions": torch.arange(TOKENS).repeat(len(ids), 1), "targets": labels}


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
            return wrap_ring_attn_func(q, k, v, None, 0.0, True, (-1, -1), slopes[:3])
        if self.mistake == "softcap as a tensor":
            return wrap_ring_attn_func(q, k, v, softcap=slopes)
        if self.mistake == "bias in a packed call":
            cu_seqlens = slopes.to(torch.int32)
            return varlen(q[0], k[0], v[0], cu_seqlens, cu_seqlens, slopes)
        if self.mistake == "seed of a part":
            return wrap_ring_attn_func(q, k, v, dropout_p=0.5, dropout_seed=DropoutSeed(1))
        if self.mistake == "offsets of a part":
            offsets = HeadOffsets("mod", 2, 8)
            return nnscaler_ring.wrap_dilated_attn_func(q, k, v, [8], [2], head_offsets=offsets)
        if self.mistake == "sinks":
            return wrap_ring_attn_func(q, k, v, sinks=slopes[:4])
        if self.mistake == "window":
            return wrap_ring_attn_func(q, k, v, window_size=(-3, 0))
        if self.mistake == "packed totals":
            cu_seqlens = slopes.to(torch.int32)
            return varlen(q[0], k[0, 4:], v[0, 4:], cu_seqlens, cu_seqlens)
        if self.mistake == "zigzag order":
            return nnscaler_ring.wrap_zigzag_attn_func(q, k, v, layout="zigzag")
        return wrap_ring_attn_func(q, k, v)


class DilatedCall(nn.Module):
    """One call of the dilated op."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return nnscaler_ring.wrap_dilated_attn_func(q, k, v, [6, 9, 40], [1, 2, 3], **self.options)


class TwoCalls(nn.Module):
    """Two calls on the same q, which the emission must tell apart."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return wrap_ring_attn_func(q, k, v) + wrap_ring_attn_func(q, v, k, causal=False)


class Autocast(nn.Module):
    """A linear layer and attention in bf16 by autocast, then float32."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device_type, dtype=torch.bfloat16):
            heads = self.linear(x).view(-1, TOKENS, 4, 4)
            out = wrap_ring_attn_func(heads, heads, heads).flatten(2)
        return out.float() * 2


class Gathering(nn.Module):
    """An op that nnScaler does not know, twice in one line, and attention to what it gives."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        out = wrap_ring_attn_func(x, x, x)
        for _ in range(2):
            y = torch.log_softmax(x, dim=-1)
            out = out + y
        return out + wrap_ring_attn_func(y, y, y)
