"""The schedule of one rank among very many, made from the few of its peers that differ.

A plan for a thousand ranks has to be made in a moment, and exchanges ask their schedule for the
work of every pair. Most of it is alike: what a rank reads from one peer takes as long as what it
reads from the next. So it is made for a few distances between ranks; where both ends and the middle
of a run of distances are alike, all of it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nnscaler_ring.core.plan.schedule import PairWork, Schedule, row_count
from nnscaler_ring.core.plan.tile import Tile


class AlikeSchedule(Schedule):
    """Another schedule as one rank sees it, who estimates: what it reads and what is read of it.

    The work of a pair may be that of a pair alike: as many pairs of queries and keys, rows and
    tiles, to one in a thousand.
    """

    def __init__(self, whole: Schedule, rank: int) -> None:
        super().__init__(whole.q_layout, whole.k_layout, whole.mask)
        self.rank = rank
        ranks = self.world_size
        alike = _by_distance(lambda n: whole.pair(rank, (rank - n) % ranks), ranks)
        self._reads = [
            PairWork((rank - n) % ranks, work.rows, work.tiles, work.source_len)
            for n, work in enumerate(alike, start=1)
        ]
        self._gives = _by_distance(lambda n: whole.pair((rank + n) % ranks, rank), ranks)

    def visible_pairs(self) -> int:
        """(query, key) pairs that the rank computes."""
        works = [self.pair(self.rank, source) for source in range(self.world_size)]
        return sum(tile.pairs() for work in works for tile in work.tiles)

    def pair(self, rank: int, source: int) -> PairWork:
        """As in `Schedule`, or of a pair alike."""
        distance = (rank - source) % self.world_size
        if distance and rank == self.rank:
            return self._reads[distance - 1]
        if distance and source == self.rank:
            return self._gives[distance - 1]
        return super().pair(rank, source)

    def tiles(self, rank: int, sources: Sequence[int]) -> list[Tile]:
        """As many tiles of the same sizes as in `Schedule`, but source by source, not merged."""
        if rank != self.rank or tuple(sources) == (rank,):
            return super().tiles(rank, sources)
        return [tile for source in sources for tile in self.pair(rank, source).tiles]


def _by_distance(make: Callable[[int], PairWork], ranks: int) -> list[PairWork]:
    """`make` of the distances 1 to ranks - 1."""
    made: dict[int, PairWork] = {}

    def at(distance: int) -> PairWork:
        if distance not in made:
            made[distance] = make(distance)
        return made[distance]

    runs = [(1, ranks - 1)] if ranks > 1 else []
    while runs:
        first, last = runs.pop()
        middle = (first + last) // 2
        if last - first > 1 and _alike(at(first), at(middle)) and _alike(at(middle), at(last)):
            made.update(dict.fromkeys(range(first + 1, last), made[middle]))
        elif last - first > 1:
            runs += [(first, middle), (middle, last)]
    return [at(distance) for distance in range(1, ranks)]


def _alike(one: PairWork, other: PairWork) -> bool:
    """Whether two pairs of ranks take as long, to one in a thousand."""
    if len(one.tiles) != len(other.tiles):
        return False
    figures = [
        (sum(tile.pairs() for tile in work.tiles), row_count(work.rows)) for work in (one, other)
    ]
    return all(abs(a - b) <= max(a, b) / 1000 for a, b in zip(*figures, strict=True))
