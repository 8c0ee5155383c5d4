"""The schedule: layouts and a mask turned into tiles. A pure function of integers, no torch.

Note [From spans to a tile]
    Within one document, query row i of one span and key row j of another stand
    `stride * (j - i) + offset` positions apart, so a band of a mask is a band on `j - i`, and its
    box of positions a box of rows. Spans with different strides have no such band and are cut into
    single tokens, whose stride does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from nnscaler_ring.core.plan.masks import CAUSAL, FULL, Mask, Window
from nnscaler_ring.core.plan.span import SequenceLayout, Span
from nnscaler_ring.core.plan.tile import UNBOUNDED, Tile, clip_keys, merge_neighbours, trim

__all__ = [
    "CAUSAL",
    "FULL",
    "Mask",
    "PairWork",
    "Rows",
    "Schedule",
    "Step",
    "Window",
    "cut_rows",
    "row_count",
    "tiles_of_spans",
    "union",
]

Rows = tuple[tuple[int, int], ...]
"""Runs `[start, stop)` of rows, ascending, not touching."""

KeyRows = tuple[tuple[int, int, int], ...]
"""Rows `[start, stop)` of a source's shard, as (source, start, stop), one after another."""


class Schedule:
    """Which tiles a rank computes, and which key rows it needs for them.

    Args:
        q_layout: who holds, and computes, which query rows.
        k_layout: who holds which key rows; as many ranks.
        mask: which positions see which.
    """

    def __init__(self, q_layout: SequenceLayout, k_layout: SequenceLayout, mask: Mask) -> None:
        self.q_layout = q_layout
        self.k_layout = k_layout
        self.mask = mask
        self.q_lens = q_layout.shard_lens
        self.k_lens = k_layout.shard_lens
        assert len(self.q_lens) == len(self.k_lens), (q_layout, k_layout)
        self._q_spans: dict[int, tuple[Span, ...]] = {}
        self._k_spans: dict[int, dict[int, list[Span]]] = {}

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return len(self.q_lens)

    def tiles(self, rank: int, sources: Sequence[int]) -> list[Tile]:
        """The tiles of `rank`'s query rows with the key rows of `sources`, one after another."""
        found: list[Tile] = []
        offset = 0
        for source in sources:
            for tile in self._pair_tiles(rank, source):
                found.append(tile.keys_moved(offset) if offset else tile)
            offset += self.k_lens[source]
        return merge_neighbours(found)

    def needed_rows(self, rank: int, source: int) -> Rows:
        """The key rows of `source` that some query of `rank` sees."""
        return union((tile.k0, tile.k1) for tile in self._pair_tiles(rank, source))

    def pair(self, rank: int, source: int) -> PairWork:
        """The work of `rank` on the keys of `source`."""
        return PairWork.of(self, rank, source)

    def _pair_tiles(self, rank: int, source: int) -> Iterator[Tile]:
        keys_by_document = self._keys_by_document(source)
        if not keys_by_document:
            return
        for q in self._spans_of_queries(rank):
            for k in keys_by_document.get(q.document, ()):
                yield from tiles_of_spans(q, k, self.mask)

    def _spans_of_queries(self, rank: int) -> tuple[Span, ...]:
        if rank not in self._q_spans:
            self._q_spans[rank] = self.q_layout.spans(rank)
        return self._q_spans[rank]

    def _keys_by_document(self, source: int) -> dict[int, list[Span]]:
        if source not in self._k_spans:
            spans: dict[int, list[Span]] = {}
            for span in self.k_layout.spans(source):
                spans.setdefault(span.document, []).append(span)
            self._k_spans[source] = spans
        return self._k_spans[source]


@dataclass(frozen=True)
class Step:
    """One message's worth of keys and the tiles that read it.

    `rows` are key rows of `source`'s shard in the order of the message; the tiles count keys along
    the message. `summed` says that some key is read by more than one tile, so that its gradient is
    a sum; `whole` that the rows are all of the source's shard.
    """

    source: int
    rows: Rows
    tiles: tuple[Tile, ...]
    summed: bool
    whole: bool

    def is_one_piece(self, batch: int) -> bool:
        """Whether the rows are one run of memory in a contiguous tensor; both sides ask."""
        return len(self.rows) == 1 and (batch == 1 or self.whole)


@dataclass(frozen=True)
class PairWork:
    """The work of a rank on one source's keys: the rows that it needs and the tiles along them."""

    source: int
    rows: Rows
    tiles: tuple[Tile, ...]
    source_len: int

    @classmethod
    def of(cls, schedule: Schedule, rank: int, source: int) -> PairWork:
        """From the schedule."""
        tiles = schedule.tiles(rank, (source,))
        rows = union((tile.k0, tile.k1) for tile in tiles)
        in_message = merge_neighbours(_along_message(tiles, rows))
        return cls(source, rows, tuple(in_message), schedule.k_lens[source])

    def step(self, number: int, parts: int) -> Step:
        """One of `parts` equal messages that the needed rows are cut into; later ones are empty."""
        if parts == 1 and number == 0:
            return self._all
        total = row_count(self.rows)
        start, stop = (min(n, parts) * total // parts for n in (number, number + 1))
        clipped = (clip_keys(tile, start, stop) for tile in self.tiles)
        part = tuple(tile.keys_moved(-start) for tile in clipped if tile)
        cut = cut_rows(self.rows, start, stop)
        whole = row_count(cut) == self.source_len
        return Step(self.source, cut, part, _summed(part), whole)

    @cached_property
    def _all(self) -> Step:
        whole = row_count(self.rows) == self.source_len
        return Step(self.source, self.rows, self.tiles, _summed(self.tiles), whole)


def row_count(rows: Rows) -> int:
    """How many rows the runs hold together."""
    return sum(stop - start for start, stop in rows)


def cut_rows(rows: Rows, start: int, stop: int) -> Rows:
    """Rows number `start` to `stop` (exclusive) of the runs put one after another."""
    cut = []
    for first, last in rows:
        piece = (max(first, first + start), min(last, first + stop))
        if piece[0] < piece[1]:
            cut.append(piece)
        start, stop = start - (last - first), stop - (last - first)
    return tuple(cut)


def tiles_of_spans(q: Span, k: Span, mask: Mask) -> Iterator[Tile]:
    """The tiles of two spans of one document: see Note [From spans to a tile]."""
    if q.stride == k.stride or k.length == 1:
        stride = q.stride
    elif q.length == 1:
        stride = k.stride
    else:
        for n in range(k.length):
            token = k._replace(row=k.row + n, position=k.position + n * k.stride, length=1)
            yield from tiles_of_spans(q, token, mask)
        return
    # Note [From spans to a tile].
    offset = k.position - q.position - stride * (k.row - q.row)
    for band in mask.bands(q, k):
        q0, q1 = _rows_between(q, band.q0, band.q1)
        k0, k1 = _rows_between(k, band.k0, band.k1)
        lo = -UNBOUNDED if band.lo == -UNBOUNDED else -((offset - band.lo) // stride)
        hi = UNBOUNDED if band.hi == UNBOUNDED else (band.hi - offset) // stride
        tile = trim(Tile(q0, q1, k0, k1, lo, hi))
        if tile:
            yield tile


def _rows_between(span: Span, first: int, stop: int) -> tuple[int, int]:
    """The rows of a span whose positions are in `[first, stop)`."""
    before = max(0, -((span.position - first) // span.stride))
    up_to = min(span.length, -((span.position - stop) // span.stride))
    return span.row + before, span.row + up_to


def union(runs: Iterable[tuple[int, int]]) -> Rows:
    """The rows that lie in any of the runs."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(runs):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        else:
            joined.append((start, stop))
    return tuple(joined)


def _along_message(tiles: Iterable[Tile], rows: Rows) -> list[Tile]:
    """The tiles with their keys numbered along the message that holds `rows`."""
    moved = []
    for tile in tiles:
        offset = 0
        for start, stop in rows:
            if start <= tile.k0 and tile.k1 <= stop:
                moved.append(tile.keys_moved(offset - start))
                break
            offset += stop - start
    return moved


def _summed(tiles: Sequence[Tile]) -> bool:
    ordered = sorted((tile.k0, tile.k1) for tile in tiles)
    return any(a[1] > b[0] for a, b in pairwise(ordered))
