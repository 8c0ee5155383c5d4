"""What a rank holds of a sequence, and the public op that lets it attend to the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnscaler_ring.core.plan.layout import Contiguous, SequenceLayout, Zigzag
from nnscaler_ring.core.plan.span import even_lens
from nnscaler_ring.core.token_index import token_index
from nnscaler_ring.ring_attn import wrap_ring_attn_func
from nnscaler_ring.ring_attn_varlen import wrap_ring_attn_varlen_func
from nnscaler_ring.zigzag_attn import wrap_zigzag_attn_func

OPS = ("zigzag", "ring", "varlen")


class Attention(nn.Module):
    """Causal attention by a public op, called by its name: that is how nnScaler finds it.

    Args:
        op: one of OPS. "varlen" attends within each document, the others to the whole sequence.
        options: further arguments of the op.
    """

    def __init__(self, op: str, **options: Any) -> None:
        super().__init__()
        self.op, self.options = op, options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Any = None) -> Tensor:
        """q [b, s, h, d], k and v [b, s, h_kv, d] -> [b, s, h, d]; packed: b = 1, cu_seqlens."""
        out: Any
        if self.op == "zigzag":
            out = wrap_zigzag_attn_func(q, k, v, **self.options)
        elif self.op == "ring":
            out = wrap_ring_attn_func(q, k, v, **self.options)
        else:
            q, k, v, bounds = q.squeeze(0), k.squeeze(0), v.squeeze(0), cu_seqlens
            out = wrap_ring_attn_varlen_func(q, k, v, bounds, bounds, causal=True, **self.options)
            out = out.unsqueeze(0)
        return out


@dataclass(frozen=True)
class Split:
    """How ranks share sequences of `tokens` tokens; group None: one device holds all of them.

    Args:
        in_zigzag_order: with "zigzag", keep the model in zigzag order, so that nothing but K and V
            moves; else the op moves contiguous shards itself, as under nnScaler.
    """

    op: str
    tokens: int
    group: list[int] | None = None
    in_zigzag_order: bool = True

    @property
    def _layout(self) -> SequenceLayout:
        assert self.group is not None, self
        ranks = len(self.group)
        if self.op == "zigzag" and self.in_zigzag_order:
            return Zigzag(self.tokens, ranks)
        return Contiguous(even_lens(self.tokens, ranks))

    def rows(self, rank: int) -> Tensor:
        """Which tokens of the whole sequence a rank holds: int64 [1, s]."""
        if self.group is None:
            return torch.arange(self.tokens)[None]
        return token_index(self._layout.positions(rank))[None]

    def attention(self, kernel: str) -> Attention:
        """The op, for what the ranks hold."""
        if self.group is None:
            return Attention(self.op, kernel=kernel)
        options: dict[str, Any] = {"kernel": kernel, "process_group": self.group}
        options["shard_lens"] = self._layout.shard_lens
        if self.op == "zigzag" and self.in_zigzag_order:
            options["layout"] = "zigzag"
        return Attention(self.op, **options)


def positions(op: str, rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """What RoPE turns rows [1, s] by; in packed documents it starts again in each of them."""
    if op != "varlen":
        return rows
    return rows - cu_seqlens[torch.searchsorted(cu_seqlens, rows, right=True) - 1]
