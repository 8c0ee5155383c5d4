"""Which rows of K and V a rank offers to others: those that are used, or the runs that hold them.

Note [Rows of several branches]
    A row that several branches use would travel once for each. Where the used rows, so counted,
    are more than the rows of the shard from the first used to the last, these runs travel instead,
    and the receiver takes every branch's rows out of them, with a stride. Both sides decide it for
    each pair of ranks from the schedule; exchanges that send every shard to everybody decide it for
    each shard. So never more rows travel than the branches use in all, nor than dense attention
    would send.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

from nnscaler_ring.core.exchange import EXCHANGES, Program
from nnscaler_ring.core.exchange.program import Action, Compute
from nnscaler_ring.core.plan.dilation import SpanningSegments, Strip
from nnscaler_ring.core.plan.schedule import (
    CAUSAL,
    FULL,
    KeyRows,
    Mask,
    Rows,
    Schedule,
    row_count,
    tiles_of_spans,
    union,
)
from nnscaler_ring.core.plan.span import Span
from nnscaler_ring.core.plan.tile import Tile


class OfferedRows(Schedule):
    """The schedule of a head group's spanning segments, over the rows that ranks offer.

    A rank offers its used rows, then its runs, where somebody reads them; or one of the two, where
    its whole shard travels. See Note [Rows of several branches].
    """

    def __init__(self, rows: SpanningSegments, mask: Mask, exchange: str) -> None:
        super().__init__(rows, rows, mask)
        assert mask in (CAUSAL, FULL), mask  # `_readers` relies on it
        self._by_pair = not EXCHANGES[exchange].sends_whole_shards
        self._used = [rows.strips(rank) for rank in range(self.world_size)]
        self._documents = [frozenset(s.span.document for s in strips) for strips in self._used]
        self._runs = [union((s.start, s.stop) for s in strips) for strips in self._used]
        self.in_runs = cache(self._reads_runs)
        self.offered = [self._offer(rank) for rank in range(self.world_size)]
        self.k_lens = tuple(sum(s.span.length for s in strips) for strips in self.offered)

    def tiles(self, rank: int, sources: Sequence[int]) -> list[Tile]:
        """As in `Schedule`; of runs, boxes that hold what is read, one per strip."""
        if not any(self.in_runs(rank, source) for source in sources):
            return super().tiles(rank, sources)
        if not self._by_pair:
            return []  # every row travels, and `reading` finds the tiles
        (source,) = sources
        start = sum(strip.span.length for strip in self._used[source])
        return [
            Tile(2 * n, 2 * n + 1, start + rows[0], start + rows[1])  # apart: they must not merge
            for n, run in enumerate(self._read_runs(rank, source))
            for rows in [tuple(_place_in(self._runs[source], edge) for edge in run)]
        ]

    def reading(self, rank: int, rows: KeyRows) -> Reading:
        """What `rank` takes out of a step's keys, and the tiles along what it takes."""
        slices: list[slice] = []
        spans: list[Span] = []
        offset = taken = 0
        for source, start, stop in rows:
            for place, strip in self._places(rank, source):
                # The numbers of the strip's rows that lie in [start, stop).
                first = max(0, -(-(start - place.start) // place.step))
                kept = range(place.start, min(place.stop, stop), place.step)[first:]
                if not kept:
                    continue
                shift = offset - start
                span = strip.span
                span = span._replace(row=taken, position=span.position + first, length=len(kept))
                if not any(True for q in self.q_spans(rank) for _ in self._tiles_of(q, span)):
                    continue
                slices.append(slice(kept.start + shift, kept[-1] + 1 + shift, place.step))
                spans.append(span)
                taken += len(kept)
            offset += stop - start
        tiles = [t for q in self.q_spans(rank) for k in spans for t in self._tiles_of(q, k)]
        return Reading(tuple(slices), tuple(tiles))

    def q_spans(self, rank: int) -> tuple[Span, ...]:
        """The spans of a rank's queries."""
        return self._spans_of_queries(rank)

    def _tiles_of(self, q: Span, k: Span) -> Iterator[Tile]:
        return tiles_of_spans(q, k, self.mask) if q.document == k.document else iter(())

    def _places(self, rank: int, source: int) -> Iterator[tuple[range, Strip]]:
        """Every strip of a source, and where its rows are among those offered."""
        used = sum(s.span.length for s in self._used[source])
        for strip in self._used[source]:
            if not self.in_runs(rank, source):
                yield range(strip.span.row, strip.span.row + strip.span.length), strip
                continue
            before = (used if self._by_pair else 0) + _place_in(self._runs[source], strip.start)
            yield range(before, before + strip.stop - strip.start, strip.step), strip

    def _reads_runs(self, rank: int, source: int) -> bool:
        """Whether `rank` reads runs of `source`'s shard, and not the used rows alone."""
        if len(self._used[source]) < 2:
            return False
        if self._by_pair:
            if rank == source:
                return False
            used = row_count(self.needed_rows(rank, source))
            return row_count(union(self._read_runs(rank, source))) < used
        used = sum(strip.span.length for strip in self._used[source])
        return row_count(self._runs[source]) < used

    def _readers(self, source: int) -> Iterable[int]:
        """Ranks that stand for all that read the source's rows: one of all that read the same.

        Shards are contiguous, so of a document a rank reads all that an earlier one holds.
        """
        if not self._by_pair:
            return (source,)
        mine = self._documents[source]
        return {
            (rank > source, documents & mine): rank
            for rank, documents in enumerate(self._documents)
            if rank != source
        }.values()

    def _read_runs(self, rank: int, source: int) -> Iterator[tuple[int, int]]:
        """The rows of the shard from the first to the last that is read, strip by strip."""
        for first, last in self.needed_rows(rank, source):
            for strip in self._used[source]:
                span = strip.span
                start, stop = max(first, span.row), min(last, span.row + span.length)
                if start < stop:
                    rows = range(strip.start, strip.stop, strip.step)
                    yield rows[start - span.row], rows[stop - 1 - span.row] + 1

    def _offer(self, source: int) -> list[Strip]:
        used = self._used[source]
        if not any(self.in_runs(rank, source) for rank in self._readers(source)):
            return used
        row = sum(strip.span.length for strip in used) if self._by_pair else 0
        runs = []
        for start, stop in self._runs[source]:
            runs.append(Strip(-1, start, stop, 1, Span(row, start, stop - start)))
            row += stop - start
        return [*used, *runs] if self._by_pair else runs


class Reading(NamedTuple):
    """Slices of a step's keys, and the tiles along what they take, one after another."""

    slices: tuple[slice, ...]
    tiles: tuple[Tile, ...]


def offered_rows_program(schedule: OfferedRows, rank: int, exchange: str) -> Program:
    """An exchange of offered rows, in which what is computed are the used ones."""
    read: Callable[[KeyRows], Reading] = cache(lambda rows: schedule.reading(rank, rows))

    def used(action: Action) -> Action:
        if not isinstance(action, Compute) or not any(
            schedule.in_runs(rank, source) for source, _, _ in action.rows
        ):
            return action
        slices, tiles = read(action.rows)
        taken = tuple((rows.start, rows.stop, rows.step) for rows in slices)
        return action._replace(tiles=tiles, taken=taken)

    return EXCHANGES[exchange].program(schedule, rank).replaced(used)


def _place_in(runs: Rows, row: int) -> int:
    """How many rows of the runs lie before `row`."""
    return sum(max(0, min(stop, row) - start) for start, stop in runs)
