"""A call: everything the ranks must agree on, and what one rank does about it, planned once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from operator import sub
from typing import Any
from zlib import crc32

import torch

from nnscaler_ring.core.exchange import EXCHANGES, Program
from nnscaler_ring.core.op.checks import check_cu_seqlens_values
from nnscaler_ring.core.op.documents import Documents, cu_seqlens_of
from nnscaler_ring.core.plan.layout import LAYOUTS, PackedDocuments, SequenceLayout
from nnscaler_ring.core.plan.masks import mask_of
from nnscaler_ring.core.plan.moves import Moves, plan_moves
from nnscaler_ring.core.plan.schedule import Schedule
from nnscaler_ring.core.shape import AttentionShape


@dataclass(frozen=True)
class Call:
    """One call of a public op, the same on all ranks of its group.

    Rows are held in `caller_layout` and computed in `compute_layout`; where they differ, they move.
    Of optional tensors it has what must be alike: their shapes without the rows.
    """

    op: str
    block_order: tuple[int, ...]
    shard_lens: tuple[int, ...]
    shard_lens_k: tuple[int, ...]
    shape: AttentionShape
    softmax_scale: float
    mask: str
    softcap: float
    alibi_slopes: tuple[int, ...] | None
    bias: tuple[object, ...] | None
    bias_gradient: bool
    sinks: bool
    dropout_p: float
    dropout_seed: str
    lse_gradient: bool | None
    caller_layout: str
    compute_layout: str
    exchange: str
    kernel: str
    deterministic: bool
    cu_seqlens_q: Documents | None
    cu_seqlens_k: Documents | None


@dataclass(frozen=True)
class RelayoutCall:
    """One move of a tensor's rows from one layout to another, the same on all ranks.

    `shard_lens` are the lengths of the contiguous shards, whichever side is contiguous.
    """

    op: str
    block_order: tuple[int, ...]
    shard_lens: tuple[int, ...]
    dim: int
    other_sizes: tuple[int, ...]
    dtype: torch.dtype
    device_type: str
    source: str
    target: str


def describe(call: Any) -> dict[str, str]:
    """Field by field, for the ranks to compare and for people to read."""
    described: dict[str, str] = {}
    for f in fields(call):
        value = getattr(call, f.name)
        if isinstance(value, AttentionShape):
            described |= {**describe(value), "dtype": str(value.torch_dtype)}
        else:
            described[f.name] = _text(value)
    return described


@dataclass(frozen=True)
class Plan:
    """What one rank does in a call: moves rows in and the result's out, or None, and computes.

    `tag` is the same on all ranks.
    """

    schedule: Schedule
    program: Program
    moves_in: Moves | None
    moves_out: Moves | None
    tag: int


@dataclass(frozen=True)
class RelayoutPlan:
    """What one rank does in a relayout; `tag` is the same on all ranks."""

    moves: Moves
    tag: int


@lru_cache(maxsize=256)
def plan_call(call: Call, block: int) -> Plan:
    """The plan of the rank that holds `block`.

    Raises:
        ValueError: cu_seqlens do not fit the tokens, or a layout does not fit the shards.
    """
    cu_q = cu_k = None
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
        cu_q, cu_k = cu_seqlens_of(call.cu_seqlens_q), cu_seqlens_of(call.cu_seqlens_k)
        check_cu_seqlens_values("cu_seqlens_q", cu_q, sum(call.shard_lens))
        check_cu_seqlens_values("cu_seqlens_k", cu_k, sum(call.shard_lens_k))
    held = LAYOUTS[call.caller_layout].for_shards(call.shard_lens, cu_q)
    layout = LAYOUTS[call.compute_layout]
    queries = layout.for_shards(call.shard_lens, cu_q)
    keys = layout.for_shards(call.shard_lens_k, cu_k)
    _check_layout(call.caller_layout, "shard_lens", held, call.shard_lens)
    moves_in = moves_out = None
    if call.caller_layout != call.compute_layout:
        if cu_q != cu_k:
            raise ValueError(
                "cu_seqlens_k must be cu_seqlens_q where the op moves the rows of queries and keys "
                f"from the {call.caller_layout} to the {call.compute_layout} layout; use another "
                "layout, in which the keys may have documents of their own."
            )
        moves_in, moves_out = plan_moves(held, queries, block), plan_moves(queries, held, block)
    else:
        _check_layout(call.caller_layout, "shard_lens_k", keys, call.shard_lens_k)
    if cu_q is not None and cu_k is not None:
        queries = PackedDocuments(queries, cu_q, cu_k)
        keys = PackedDocuments(keys, cu_k, cu_k)
    mask = mask_of(call.mask)
    mask.check(_lengths(cu_q, cu_k, call))
    schedule = Schedule(queries, keys, mask)
    program = EXCHANGES[call.exchange].program(schedule, block)
    return Plan(schedule, program, moves_in, moves_out, tag_of(call))


@lru_cache(maxsize=256)
def plan_relayout(call: RelayoutCall, block: int, rows: int) -> RelayoutPlan:
    """The plan of the rank that holds `block` and passes `rows` rows.

    Raises:
        ValueError: the source layout gives this rank another number of rows.
    """
    source, target = (LAYOUTS[x].for_shards(call.shard_lens) for x in (call.source, call.target))
    if source.shard_lens[block] != rows:
        raise ValueError(
            f"x must have {source.shard_lens[block]} rows along dim {call.dim}, what the "
            f"{call.source} layout gives this rank for shard_lens={list(call.shard_lens)}, "
            f"got {rows}; shards of different lengths need shard_lens."
        )
    return RelayoutPlan(plan_moves(source, target, block), tag_of(call))


def tag_of(call: object) -> int:
    """A number that is the same on all ranks of a call."""
    # Python's own hash differs from process to process.
    return crc32(repr(call).encode())


def _lengths(
    cu_q: tuple[int, ...] | None, cu_k: tuple[int, ...] | None, call: Call
) -> list[tuple[int, int]]:
    """(queries, keys) of every document."""
    if cu_q is None or cu_k is None:
        return [(sum(call.shard_lens), sum(call.shard_lens_k))]
    lens_q, lens_k = (map(sub, cu[1:], cu) for cu in (cu_q, cu_k))
    return list(zip(lens_q, lens_k, strict=True))


def _check_layout(name: str, argument: str, layout: SequenceLayout, lens: tuple[int, ...]) -> None:
    if layout.shard_lens != lens:
        raise ValueError(
            f"{argument} must be what layout={name!r} gives {sum(lens)} tokens over {len(lens)} "
            f"ranks, {list(layout.shard_lens)}, got {list(lens)}."
        )


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return str(list(cu_seqlens_of(value)))
    return str(list(value)) if isinstance(value, tuple) else str(value)
