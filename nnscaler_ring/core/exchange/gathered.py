"""The gathered exchange: the rows that a rank reads, from all ranks at once, in a few stages.

A stage brings the rows of many ranks and puts them in order of documents and positions, so that the
queries of a document meet one run of keys: few and large kernel calls, where the direct exchange
has at least one for every rank it reads from. A rank does not go from one round to the next with
its peers, so that ranks which differ from step to step, but not in all, do not wait for each other.
Bytes: the mask's lower bound, as those of the direct exchange; gradients come home in one hop.
Memory: the rows of two stages, a few shards; see Note [Stages].

Note [Stages]
    Stage n brings a rank the rows of the ranks at some distances from it. Both sides derive the
    same distances without knowing what the other reads: a rank reads of another at most the rows of
    the documents that both hold. Distances are added to a stage for as long as none of the ranks
    would read more than `STAGE_SHARDS` shards in it by that bound.

Note [One call for many ranks]
    The tiles are those of each pair of ranks, renumbered along the stage and merged where they
    touch. So a key of a stage is read by at most as many tiles as in its own pair, and whether its
    gradient is a sum is known to both sides from the pair alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

from nnscaler_ring.core.exchange.program import (
    OWN,
    USUAL,
    Action,
    Add,
    Compute,
    Cut,
    Free,
    Join,
    Post,
    Program,
    Receive,
    Send,
    Wait,
)
from nnscaler_ring.core.exchange.rounds import Distance
from nnscaler_ring.core.plan.schedule import KeyRows, Rows, Schedule, Step
from nnscaler_ring.core.plan.span import SequenceLayout
from nnscaler_ring.core.plan.tile import Tile, clip_keys, merge_neighbours

STAGE_SHARDS = 4
"""A stage brings at most so many times the rows of the longest shard, but at least one rank's."""

ASKED_RANKS = 64
"""So many ranks, those that may read most, set the stages of larger groups."""


def gathered(schedule: Schedule, rank: int, cut: Cut = USUAL) -> Program:
    """All rows that a rank reads, in as few stages as memory allows.

    `cut` changes nothing: stages are cut between ranks.
    """
    own = Compute(OWN, ((rank, 0, schedule.k_lens[rank]),), tuple(schedule.tiles(rank, (rank,))))
    places = count(1)
    stages = [
        _Stage.of(schedule, rank, distances, places) for distances in stage_distances(schedule)
    ]
    return Program(
        rank, schedule.k_lens, tuple(_forward(own, stages)), tuple(_backward(own, stages))
    )


def stage_distances(schedule: Schedule) -> list[list[int]]:
    """The distances of every stage, the same on all ranks: see Note [Stages]."""
    ranks, budget = schedule.world_size, STAGE_SHARDS * max(schedule.k_lens)
    by_distance = _most_rows(schedule.q_layout, schedule.k_layout, ASKED_RANKS)
    stages: list[list[int]] = []
    brought: Counter[int] = Counter()
    for distance in range(1, ranks):
        more = by_distance[distance]
        if not more:
            continue
        if not stages or any(brought[rank] + rows > budget for rank, rows in more.items()):
            stages.append([])
            brought.clear()
        stages[-1].append(distance)
        brought.update(more)
    return stages


@lru_cache(maxsize=16)
def _most_rows(
    q_layout: SequenceLayout, k_layout: SequenceLayout, asked_ranks: int
) -> dict[int, dict[int, int]]:
    """By distance: the most rows that each of the ranks that are asked can read of the other."""
    ranks = len(q_layout.shard_lens)
    of_queries = [{q.document for q in q_layout.spans(rank)} for rank in range(ranks)]
    holders: dict[int, Counter[int]] = defaultdict(Counter)
    for source in range(ranks):
        for span in k_layout.spans(source):
            holders[span.document][source] += span.length
    totals = {document: held.total() for document, held in holders.items()}
    reads = [sum(totals.get(document, 0) for document in some) for some in of_queries]
    asked = sorted(range(ranks), key=lambda rank: -reads[rank])[:asked_ranks]
    found: dict[int, dict[int, int]] = defaultdict(Counter)
    for rank in asked:
        for document in of_queries[rank]:
            for source, rows in holders[document].items():
                found[(rank - source) % ranks][rank] += rows
    return found


@dataclass(frozen=True)
class _Stage:
    """One rank's part of a stage.

    Args:
        rank: whose part it is.
        incoming: what this rank reads, by (the place where it arrives, the rows and their source).
        outgoing: what others read of it, by (the place where gradients return, the rank, rows).
        joined: the place of all rows that came in, in order.
        pieces: (number in `incoming`, start, stop) of the messages, in the order of `joined`.
        rows: whose rows they are.
        tiles: count keys along `joined`.
        home: for every message that came in, its rows in `joined`, in the order of the message.
    """

    rank: int
    incoming: tuple[tuple[int, Step], ...]
    outgoing: tuple[tuple[int, int, Step], ...]
    joined: int
    pieces: tuple[tuple[int, int, int], ...]
    rows: KeyRows
    tiles: tuple[Tile, ...]
    home: tuple[Rows, ...]

    @classmethod
    def of(
        cls, schedule: Schedule, rank: int, distances: Sequence[int], places: Iterator[int]
    ) -> _Stage:
        """From the schedule. `places` gives numbers that no other place has."""
        pairs = [Distance.of(schedule, rank, distance) for distance in distances]
        incoming = [pair.incoming.step(0, 1) for pair in pairs if pair.incoming.rows]
        outgoing = [(pair.target, pair.outgoing.step(0, 1)) for pair in pairs if pair.outgoing.rows]
        pieces = sorted(
            (document, position, number, start, stop, row)
            for number, step in enumerate(incoming)
            for document, position, start, stop, row in _pieces(schedule, step)
        )
        tiles: list[Tile] = []
        home: list[list[tuple[int, int, int]]] = [[] for _ in incoming]
        offset = 0
        for _, _, number, start, stop, _ in pieces:
            home[number].append((start, offset, offset + stop - start))
            for tile in incoming[number].tiles:
                part = clip_keys(tile, start, stop)
                if part:
                    tiles.append(part.keys_moved(offset - start))
            offset += stop - start
        return cls(
            rank,
            tuple((next(places), step) for step in incoming),
            tuple((next(places), target, step) for target, step in outgoing),
            next(places),
            tuple(piece[2:5] for piece in pieces),
            tuple((incoming[n].source, row, row + b - a) for _, _, n, a, b, row in pieces),
            tuple(merge_neighbours(tiles)),
            tuple(tuple((a, b) for _, a, b in sorted(runs)) for runs in home),
        )

    def keys(self) -> Post:
        """What this rank reads of others, and what they read of it."""
        sends = [Send(to, OWN, step.rows, step.whole) for _, to, step in self.outgoing]
        receives = [
            Receive(step.source, place, _rows_of(step.source, step), step.whole)
            for place, step in self.incoming
        ]
        return Post(2 * self.joined, "keys", tuple(sends), tuple(receives))

    def compute(self) -> Iterator[Action]:
        """Wait for the keys, put them in order and attend to them."""
        if not self.incoming:
            return
        arrived = [place for place, _ in self.incoming]
        yield Join(self.joined, tuple((arrived[n], start, stop) for n, start, stop in self.pieces))
        for place in arrived:
            yield Free(place)
        yield Compute(self.joined, self.rows, self.tiles)
        yield Free(self.joined)

    def gradients(self) -> Post:
        """Those of the rows that this rank read to their owners, those of its own rows back."""
        sends = [
            Send(step.source, self.joined, rows, False, step.summed)
            for (_, step), rows in zip(self.incoming, self.home, strict=True)
        ]
        receives = [
            Receive(reader, place, _rows_of(self.rank, step), False, step.summed)
            for place, reader, step in self.outgoing
        ]
        return Post(2 * self.joined + 1, "gradients", tuple(sends), tuple(receives))

    def settle(self) -> Iterator[Action]:
        """Wait for the gradients and add those of the own rows."""
        yield Wait(2 * self.joined + 1)
        for place, _, step in self.outgoing:
            yield Add(place, OWN, step.rows)


def _forward(own: Compute, stages: Sequence[_Stage]) -> Iterator[Action]:
    """While a stage is computed, the next one is under way."""
    yield from _arrivals(own, stages, lambda stage: iter(()))


def _backward(own: Compute, stages: Sequence[_Stage]) -> Iterator[Action]:
    """The same; the gradients of a stage are under way while the next one is computed."""
    settling: list[_Stage] = []

    def send_home(stage: _Stage) -> Iterator[Action]:
        yield stage.gradients()
        if settling:
            yield from settling.pop().settle()
        settling.append(stage)

    yield from _arrivals(own, stages, send_home)
    for stage in settling:
        yield from stage.settle()


def _arrivals(
    own: Compute, stages: Sequence[_Stage], after: Callable[[_Stage], Iterator[Action]]
) -> Iterator[Action]:
    """The own keys, then every stage's, and what comes after each stage."""
    if stages:
        yield stages[0].keys()
    yield own
    for number, stage in enumerate(stages):
        yield Wait(2 * stage.joined)
        if number + 1 < len(stages):
            yield stages[number + 1].keys()
        yield from stage.compute()
        yield from after(stage)


def _pieces(schedule: Schedule, step: Step) -> Iterator[tuple[int, int, int, int, int]]:
    """A message cut where positions jump: (document, position, start, stop, row of its owner).

    Rows that no span of the layout holds count as a document of their own.
    """
    spans = schedule.k_layout.spans(step.source)
    offset = 0
    for first, last in step.rows:
        row = first
        for span in spans:
            if span.row + span.length <= row or span.row >= last:
                continue
            if row < span.row:
                yield -1, row, offset + row - first, offset + span.row - first, row
                row = span.row
            stop = min(last, span.row + span.length)
            position = span.position + (row - span.row) * span.stride
            yield span.document, position, offset + row - first, offset + stop - first, row
            row = stop
        if row < last:
            yield -1, row, offset + row - first, offset + last - first, row
        offset += last - first


def _rows_of(source: int, step: Step) -> KeyRows:
    return tuple((source, start, stop) for start, stop in step.rows)
