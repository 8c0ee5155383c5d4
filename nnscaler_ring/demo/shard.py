"""What a rank holds of a sequence, and the public op that lets it attend to the rest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nnscaler_ring.core.layout import Contiguous, SequenceLayout, Zigzag
from nnscaler_ring.demo.model import Attention
from nnscaler_ring.ring_attn import wrap_ring_attn_func
from nnscaler_ring.ring_attn_varlen import wrap_ring_attn_varlen_func
from nnscaler_ring.zigzag_attn import wrap_zigzag_attn_func, zigzag_positions

OPS = ("zigzag", "ring", "varlen")


@dataclass(frozen=True)
class Shard:
    """`rows` of the whole sequence are on this rank; `positions` are what RoPE turns by."""

    rows: Tensor  # int64 [s]
    positions: Tensor  # int64 [s]
    attention: Attention


def make_shard(
    op: str,
    cu_seqlens: Tensor,
    *,
    group: list[int] | None,
    rank: int,
    device: torch.device,
    kernel: str,
) -> Shard:
    """This rank's share of a sequence, for causal attention.

    Args:
        op: one of OPS. "varlen" attends within each document, the others to the whole sequence;
            "zigzag" keeps the model in zigzag order, so that nothing but K and V moves.
        cu_seqlens: [documents + 1], global.
        group: None for the whole sequence on one device.
    """
    tokens, world_size = int(cu_seqlens[-1]), len(group or [0])
    layout: SequenceLayout
    if op == "zigzag":
        layout = Zigzag(tokens, world_size)
        rows = zigzag_positions(tokens, group)
    else:
        edges = [n * tokens // world_size for n in range(world_size + 1)]
        layout = Contiguous(tuple(edges[n + 1] - edges[n] for n in range(world_size)))
        rows = torch.arange(edges[rank], edges[rank + 1])
    options: dict[str, Any] = {
        "process_group": group,
        "shard_lens": layout.shard_lens,
        "kernel": kernel,
    }
    positions = rows
    if op == "varlen":
        positions = rows - cu_seqlens[torch.searchsorted(cu_seqlens, rows, right=True) - 1]
    return Shard(
        rows=rows,
        positions=positions.to(device),
        attention=partial(_ATTENTION[op], cu_seqlens=cu_seqlens, options=options),
    )


def _zigzag(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor, options: dict[str, Any]
) -> Tensor:
    return wrap_zigzag_attn_func(q[None], k[None], v[None], **options, layout="zigzag")[0]


def _ring(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor, options: dict[str, Any]
) -> Tensor:
    return wrap_ring_attn_func(q[None], k[None], v[None], **options)[0]


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor, options: dict[str, Any]
) -> Tensor:
    out = wrap_ring_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, causal=True, **options)
    assert isinstance(out, Tensor), type(out)
    return out


_ATTENTION = {"zigzag": _zigzag, "ring": _ring, "varlen": _varlen}
