"""Rows between two layouts of the same tokens (contiguous <-> zigzag), whoever holds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from nnscaler_ring.core.layout import SequenceLayout, Span
from nnscaler_ring.core.transport import Message, Transport

RUNS_APART = 2
"""So many runs to a rank are messages of their own, without a copy where they are one piece; more,
as of many documents, are packed into one: NCCL may hang in a post of a thousand messages."""


class Run(NamedTuple):
    """Rows that this rank exchanges with the rank of another block."""

    block: int
    rows: slice


class Moves(NamedTuple):
    """One rank's part of a relayout: what it keeps (old rows, new rows), sends and receives."""

    kept: tuple[tuple[slice, slice], ...]
    sends: tuple[Run, ...]
    receives: tuple[Run, ...]
    new_length: int

    def sent_rows(self) -> int:
        """How many rows leave this rank."""
        return sum(_count(run.rows) for run in self.sends)


@lru_cache(maxsize=256)
def plan_moves(source: SequenceLayout, target: SequenceLayout, rank: int) -> Moves:
    """What `rank` does when every token goes from its row in `source` to its row in `target`."""
    others = [block for block in range(len(source.shard_lens)) if block != rank]
    return Moves(
        kept=tuple(_shared_rows(source, rank, target, rank)),
        sends=tuple(
            Run(b, old) for b in others for old, _ in _shared_rows(source, rank, target, b)
        ),
        receives=tuple(
            Run(b, new) for b in others for _, new in _shared_rows(source, b, target, rank)
        ),
        new_length=target.shard_lens[rank],
    )


def move_rows(
    tensors: Sequence[tuple[Tensor, int]], moves: Moves, transport: Transport
) -> list[Tensor]:
    """Tensors with their rows along `dim` in the target layout: fresh, contiguous, moved together.

    Args:
        tensors: (tensor, dim) with this rank's rows of the source layout.
    """
    results: list[Tensor] = []
    sends: list[Message] = []
    receives: list[Message] = []
    arrivals: list[tuple[Tensor, Tensor]] = []
    for x, dim in tensors:
        moved = x.new_empty(*x.shape[:dim], moves.new_length, *x.shape[dim + 1 :])
        results.append(moved)
        for block, pieces in _by_block(x, dim, moves.sends):
            if len(pieces) > RUNS_APART:
                pieces = [torch.cat(pieces, dim)]
            sends += [Message(block, rows.contiguous()) for rows in pieces]
        for block, pieces in _by_block(moved, dim, moves.receives):
            if len(pieces) > RUNS_APART:
                lengths = [rows.shape[dim] for rows in pieces]
                packed = x.new_empty(*x.shape[:dim], sum(lengths), *x.shape[dim + 1 :])
                receives.append(Message(block, packed))
                arrivals += zip(pieces, packed.split(lengths, dim), strict=True)
                continue
            for rows in pieces:
                # A run that is one piece of memory is received where it belongs, without a copy.
                buffer = rows if rows.is_contiguous() else rows.new_empty(rows.shape)
                receives.append(Message(block, buffer))
                arrivals.append((rows, buffer))
    transfer = transport.post("relayout", sends, receives)
    for (x, dim), moved in zip(tensors, results, strict=True):
        before = (slice(None),) * dim
        for old, new in moves.kept:
            moved[(*before, new)] = x[(*before, old)]
    transfer.wait()
    for rows, buffer in arrivals:
        if buffer is not rows:
            rows.copy_(buffer)
    return results


def _by_block(x: Tensor, dim: int, runs: Sequence[Run]) -> Iterator[tuple[int, list[Tensor]]]:
    """(block, the rows of its runs, as views) for every block, whose runs lie together."""
    before = (slice(None),) * dim
    for block, some in groupby(runs, key=lambda run: run.block):
        yield block, [x[(*before, run.rows)] for run in some]


def _shared_rows(
    source: SequenceLayout, holder: int, target: SequenceLayout, taker: int
) -> Iterator[tuple[slice, slice]]:
    """Tokens that `holder` has in `source` and `taker` in `target`: (old rows, new rows)."""
    for old in source.spans(holder):
        for new in target.spans(taker):
            yield from _overlap(old, new)


def _overlap(old: Span, new: Span) -> Iterator[tuple[slice, slice]]:
    stride = max(old.stride, new.stride)
    assert {old.stride, new.stride} <= {1, stride}, (old, new)
    # The first common position: at or after both starts, on the grid of the coarser span.
    grid = old.position if old.stride == stride else new.position
    if old.stride == new.stride and (old.position - new.position) % stride:
        return
    start = max(old.position, new.position)
    start += (grid - start) % stride
    stop = min(_end(old), _end(new))
    count = -(-(stop - start) // stride)
    if count > 0:
        yield _rows(old, start, count, stride), _rows(new, start, count, stride)


def _end(span: Span) -> int:
    return span.position + (span.length - 1) * span.stride + 1


def _rows(span: Span, position: int, count: int, stride: int) -> slice:
    first = span.row + (position - span.position) // span.stride
    step = stride // span.stride
    return slice(first, first + (count - 1) * step + 1, step)


def _count(rows: slice) -> int:
    return len(range(rows.start, rows.stop, rows.step))
