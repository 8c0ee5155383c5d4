"""Dilated attention: the engine run on selected rows, and its branches merged.

Per branch and head group the rows that are used are packed attention (see dilation.py), which the
engine computes over any exchange. Branches are merged by log-sum-exp: one softmax over the keys of
all branches, in which a key that two branches show counts twice. The backward pass hands the
merged out and softmax_lse to every branch, as it does to every tile: see Note [Global out and
softmax_lse] in engine.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nnscaler_ring.core.chunks import InChunks
from nnscaler_ring.core.engine import gradient_sums, partial_attention
from nnscaler_ring.core.exchange import KVExchange, Performance, Program
from nnscaler_ring.core.exchange.program import alone
from nnscaler_ring.core.kernels import AttentionKernel, BackwardTensors
from nnscaler_ring.core.offered_rows import OfferedRows, offered_rows_program
from nnscaler_ring.core.plan.dilation import (
    Branch,
    HeadGroup,
    HeadOffsets,
    SpanningSegments,
    Strip,
    WholeSegments,
    head_groups,
    whole_segments,
)
from nnscaler_ring.core.plan.layout import Contiguous
from nnscaler_ring.core.plan.schedule import Mask, Schedule
from nnscaler_ring.core.ranks.transport import Transport
from nnscaler_ring.core.scores.scores import Scores
from nnscaler_ring.core.sums.online_softmax import PartialOutput, accumulation_dtype


class Selection(Protocol):
    """Some rows and KV heads of a shard, as a tensor that the engine takes.

    Tensors are [batch, tokens, num_kv_heads, ...].
    """

    def take(self, x: Tensor) -> Tensor:
        """The selected rows and heads: [some batch, rows, heads, ...]."""
        ...

    def put(self, branch: int, target: Tensor, rows: Tensor) -> None:
        """Write those of `rows`, in the form of `take`, that belong to a branch."""
        ...

    def add(self, target: Tensor, rows: Tensor) -> None:
        """Add `rows`, in the form of `take`; those of several branches may meet."""
        ...


@dataclass(frozen=True)
class WholeSegmentRows:
    """What a head group uses of the segments inside a shard: every segment a row of the batch."""

    branch: int
    segments: WholeSegments
    rate: int
    group: HeadGroup

    def take(self, x: Tensor) -> Tensor:
        return self._view(x).flatten(0, 1)

    def put(self, branch: int, target: Tensor, rows: Tensor) -> None:
        if branch == self.branch:
            view = self._view(target)
            view.copy_(rows.view_as(view))

    def add(self, target: Tensor, rows: Tensor) -> None:
        view = self._view(target)
        view.add_(rows.reshape(view.shape))

    def _view(self, x: Tensor) -> Tensor:
        start, count, length = self.segments.start, self.segments.count, self.segments.length
        rows = x[:, start : start + count * length].unflatten(1, (count, length))
        (offset,) = self.group.offsets
        return rows[:, :, offset :: self.rate, self.group.heads]


@dataclass(frozen=True)
class SpanningRows:
    """What a head group uses of the segments that reach beyond a shard, one after another."""

    strips: tuple[Strip, ...]
    group: HeadGroup

    def take(self, x: Tensor) -> Tensor:
        if not self.strips:
            return x[:, :0, self.group.heads]
        return torch.cat([x[:, strip.rows, self.group.heads] for strip in self.strips], dim=1)

    def put(self, branch: int, target: Tensor, rows: Tensor) -> None:
        for strip in self.strips:
            if strip.branch == branch:
                target[:, strip.rows, self.group.heads] = rows[:, _kept(strip)]

    def add(self, target: Tensor, rows: Tensor) -> None:
        for strip in self.strips:
            target[:, strip.rows, self.group.heads] += rows[:, _kept(strip)]


def _kept(strip: Strip) -> slice:
    return slice(strip.span.row, strip.span.row + strip.span.length)


@dataclass(frozen=True)
class Part:
    """A part of the work: which queries, which keys this rank gives to it, how they meet."""

    queries: Selection
    keys: Selection
    program: Program


@dataclass(frozen=True)
class DilatedPlan:
    """The work of one rank: `alone[n]` is branch n's inside the shard; `shared` has all branches'.

    All ranks have as many shared parts, in the same order.
    """

    alone: tuple[tuple[Part, ...], ...]
    shared: tuple[Part, ...]

    @classmethod
    def of(
        cls,
        branches: Sequence[Branch],
        head_offsets: HeadOffsets,
        num_kv_heads: int,
        shard_lens: Sequence[int],
        mask: Mask,
        exchange: str,
        block: int,
    ) -> DilatedPlan:
        """The plan of the rank that holds `block`."""
        start = sum(shard_lens[:block])
        stop = start + shard_lens[block]
        alone = [
            _inside(number, branch, whole_segments(start, stop, branch.length), groups, mask)
            for number, branch in enumerate(branches)
            for groups in [head_groups([branch], head_offsets, num_kv_heads)]
        ]
        shared = []
        for group in head_groups(branches, head_offsets, num_kv_heads):
            rows = SpanningSegments(tuple(shard_lens), tuple(branches), group.offsets)
            if any(rows.shard_lens):
                schedule = OfferedRows(rows, mask, exchange)
                queries = SpanningRows(tuple(rows.strips(block)), group)
                keys = SpanningRows(tuple(schedule.offered[block]), group)
                program = offered_rows_program(schedule, block, exchange)
                shared.append(Part(queries, keys, program))
        return cls(tuple(alone), tuple(shared))


def _inside(
    number: int, branch: Branch, segments: WholeSegments, groups: Sequence[HeadGroup], mask: Mask
) -> tuple[Part, ...]:
    if not segments.count:
        return ()
    parts = []
    for group in groups:
        (offset,) = group.offsets
        rows = Contiguous((len(range(offset, branch.length, branch.rate)),))
        selection = WholeSegmentRows(number, segments, branch.rate, group)
        parts.append(Part(selection, selection, alone(Schedule(rows, rows, mask))))
    return tuple(parts)


def dilated_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    plan: DilatedPlan,
    transport: Transport,
    kernel: AttentionKernel,
    softmax_scale: float,
    chunks: int = 1,
) -> tuple[Tensor, Tensor]:
    """Dilated attention of this rank's queries to everybody's keys.

    Args:
        q: [batch, shard_len, num_heads, head_dim].
        k: [batch, shard_len, num_kv_heads, head_dim]; v likewise with v_head_dim.
        chunks: parts that keys come in, on one device.

    Returns:
        out in q's dtype, softmax_lse [batch, num_heads, shard_len].
    """
    grouped = _by_kv_head(q, k.shape[2])

    def attend(part: Part) -> tuple[Selection, Tensor, Tensor]:
        keys = part.keys
        rows = _heads_together(part.queries.take(grouped)), keys.take(k), keys.take(v)
        exchange = _started(part, transport, chunks)
        partial = partial_attention(
            *rows, exchange=exchange, kernel=kernel, scores=Scores(softmax_scale)
        )
        out, lse = partial.current()
        heads = rows[1].shape[2]
        return part.queries, _by_kv_head(out, heads), _by_kv_head(lse.transpose(1, 2), heads)

    shared = [attend(part) for part in plan.shared]
    merged = PartialOutput(q, v.shape[-1])
    for branch, parts in enumerate(plan.alone):
        out = grouped.new_zeros((*grouped.shape[:-1], v.shape[-1]), dtype=merged.dtype)
        lse = out.new_full(out.shape[:-1], -torch.inf)
        for queries, part_out, part_lse in (*map(attend, parts), *shared):
            queries.put(branch, out, part_out)
            queries.put(branch, lse, part_lse)
        rows = slice(0, q.shape[1])
        merged.merge_(rows, _heads_together(out), _heads_together(lse).transpose(1, 2))
    out, softmax_lse = merged.current()
    return out.to(q.dtype).contiguous(), softmax_lse.contiguous()


def dilated_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    *,
    plan: DilatedPlan,
    transport: Transport,
    kernel: AttentionKernel,
    softmax_scale: float,
    chunks: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv from the gradients of out and of softmax_lse."""
    heads = k.shape[2]
    dtype = accumulation_dtype(q.dtype)
    grouped, dout, out, softmax_lse = (
        _by_kv_head(x, heads) for x in (q, dout, out, softmax_lse.transpose(1, 2))
    )
    if dlse is not None:
        dlse = _by_kv_head(dlse.transpose(1, 2), heads)
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (grouped, k, v))
    for part in (*plan.shared, *(part for parts in plan.alone for part in parts)):

        def rows_of(x: Tensor, queries: Selection = part.queries) -> Tensor:
            return _heads_together(queries.take(x))

        part_q, part_dout, part_out, part_lse = map(rows_of, (grouped, dout, out, softmax_lse))
        tensors = BackwardTensors(
            part_dout,
            None if dlse is None else rows_of(dlse).transpose(1, 2),
            part_q,
            part.keys.take(k),
            part.keys.take(v),
            part_out,
            part_lse.transpose(1, 2),
        )
        part_dq, part_dk, part_dv = gradient_sums(
            tensors,
            exchange=_started(part, transport, chunks),
            kernel=kernel,
            scores=Scores(softmax_scale),
        )
        part.queries.add(dq, _by_kv_head(part_dq, part_dk.shape[2]))
        part.keys.add(dk, part_dk)
        part.keys.add(dv, part_dv)
    dq = _heads_together(dq)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _started(part: Part, transport: Transport, chunks: int) -> KVExchange:
    exchange = Performance(part.program, transport)
    return exchange if chunks == 1 else InChunks(exchange, chunks)


def _by_kv_head(x: Tensor, num_kv_heads: int) -> Tensor:
    """[b, rows, num_heads, ...] as [b, rows, num_kv_heads, query heads of each, ...]."""
    return x.unflatten(2, (num_kv_heads, -1))


def _heads_together(x: Tensor) -> Tensor:
    """Undo `_by_kv_head`."""
    return x.flatten(2, 3)
