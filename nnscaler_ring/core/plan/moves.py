"""Which rows a rank keeps, sends and receives when tokens go from one layout to another."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from nnscaler_ring.core.plan.span import SequenceLayout, Span


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
