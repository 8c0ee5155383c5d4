"""A rank's work, step by step: seconds of computing and bytes in and out, from the tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from nnscaler_ring.core.exchange import USUAL
from nnscaler_ring.core.exchange.rounds import Distance, Round, rounds_of
from nnscaler_ring.core.plan.schedule import row_count
from nnscaler_ring.core.plan.tile import Tile
from nnscaler_ring.core.sizes import Sizes
from nnscaler_ring.simulator.call import SimulatedCall
from nnscaler_ring.simulator.cluster import Cluster
from nnscaler_ring.simulator.memory import KernelTraits


class StepWork(NamedTuple):
    """One message in and out, and what is computed with the keys that it brings.

    Rows are those of K and V; `gradients_wide` says that gradients go home in float32.
    """

    source: int
    target: int
    rows_in: int
    rows_out: int
    tiles: tuple[Tile, ...]
    wide_in: bool = False
    wide_out: bool = False

    @classmethod
    def of(cls, round_: Round) -> StepWork:
        """Of the direct exchange."""
        one, other = round_.incoming, round_.outgoing
        rows = row_count(one.rows), row_count(other.rows)
        return cls(one.source, round_.target, *rows, one.tiles, one.summed, other.summed)


@dataclass(frozen=True)
class RankWork:
    """One rank's work in one pass: what it does at once, then message after message."""

    rank: int
    local: tuple[Tile, ...]
    steps: tuple[StepWork, ...]

    def pairs(self) -> int:
        """Visible (query, key) pairs in all."""
        remote = sum(tile.pairs() for step in self.steps for tile in step.tiles)
        return remote + sum(tile.pairs() for tile in self.local)


def rank_work(call: SimulatedCall, rank: int, *, backward: bool) -> RankWork:
    """What a rank does with the direct exchange, message by message."""
    rounds = rounds_of(call.schedule, rank, USUAL.backward_keys if backward else USUAL.forward_keys)
    tiles = tuple(call.schedule.tiles(rank, (rank,)))
    return RankWork(rank, tiles, tuple(map(StepWork.of, rounds)))


def ring_work(call: SimulatedCall, rank: int) -> RankWork:
    """What a rank does with the ring exchange: every shard passes by."""
    schedule = call.schedule
    tiles = [
        tuple(schedule.tiles(rank, ((rank - distance) % call.ranks,)))
        for distance in range(1, call.ranks)
    ]
    return RankWork(rank, tuple(schedule.tiles(rank, (rank,))), _ring_steps(call, rank, tiles))


def planned_work(call: SimulatedCall, rank: int) -> tuple[RankWork, RankWork]:
    """What a rank does with the direct and with the ring exchange, one step per source.

    Tiles are made for a few distances; where both ends and the middle of a run of distances are
    alike, all of it is. So a plan for a thousand ranks takes milliseconds.
    """
    schedule, ranks = call.schedule, call.ranks

    def step(distance: int) -> StepWork:
        found = Distance.of(schedule, rank, distance)
        one, other = found.incoming.step(0, 1), found.outgoing.step(0, 1)
        return StepWork.of(Round(distance, one, found.target, other))

    steps = _by_distance(step, ranks)
    direct = tuple(
        found._replace(source=(rank - distance) % ranks, target=(rank + distance) % ranks)
        for distance, found in enumerate(steps, start=1)
        if found.rows_in or found.rows_out
    )
    local = tuple(schedule.tiles(rank, (rank,)))
    ring = _ring_steps(call, rank, [found.tiles for found in steps])
    return RankWork(rank, local, direct), RankWork(rank, local, ring)


def _ring_steps(
    call: SimulatedCall, rank: int, tiles: Sequence[tuple[Tile, ...]]
) -> tuple[StepWork, ...]:
    lens, ranks = call.schedule.k_lens, call.ranks
    left, right = (rank - 1) % ranks, (rank + 1) % ranks
    return tuple(
        StepWork(
            left, right, lens[(rank - d) % ranks], lens[(rank - d + 1) % ranks], some, True, True
        )
        for d, some in enumerate(tiles, start=1)
    )


def _by_distance(make: Callable[[int], StepWork], ranks: int) -> list[StepWork]:
    """`make` of the distances 1 to ranks - 1."""
    steps: dict[int, StepWork] = {}

    def at(distance: int) -> StepWork:
        if distance not in steps:
            steps[distance] = make(distance)
        return steps[distance]

    runs = [(1, ranks - 1)]
    while runs:
        first, last = runs.pop()
        middle = (first + last) // 2
        if last - first > 1 and _alike(at(first), at(middle)) and _alike(at(middle), at(last)):
            steps.update(dict.fromkeys(range(first + 1, last), steps[middle]))
        elif last - first > 1:
            runs += [(first, middle), (middle, last)]
    return [at(distance) for distance in range(1, ranks)]


def _alike(one: StepWork, other: StepWork) -> bool:
    """Whether two steps take as long, to one in a thousand."""
    kinds = [(len(step.tiles), step.wide_in, step.wide_out) for step in (one, other)]
    if kinds[0] != kinds[1]:
        return False
    figures = [
        (sum(tile.pairs() for tile in step.tiles), step.rows_in, step.rows_out)
        for step in (one, other)
    ]
    return all(abs(a - b) <= max(a, b) / 1000 for a, b in zip(*figures, strict=True))


@dataclass(frozen=True)
class Costs:
    """Seconds of a call's tiles on a cluster's device."""

    sizes: Sizes
    cluster: Cluster
    traits: KernelTraits
    _known: dict[tuple[tuple[Tile, ...], bool, bool], float] = field(default_factory=dict)

    def seconds(self, tiles: Sequence[Tile], *, backward: bool, alone: bool = False) -> float:
        """Of one step's kernel calls and their merging or summing; `alone`: nothing to merge."""
        key = tuple(tiles), backward, alone
        if key not in self._known:
            self._known[key] = self._seconds(tiles, backward, alone)
        return self._known[key]

    def _seconds(self, tiles: Sequence[Tile], backward: bool, alone: bool) -> float:
        rates = self.cluster.rates_for(self.sizes.dtype)
        if backward:
            rate, call_seconds = rates.backward_flops_per_second, rates.backward_call_seconds
            short = rates.backward_short
        else:
            rate, call_seconds = rates.forward_flops_per_second, rates.forward_call_seconds
            short = rates.forward_short
        seconds = 0.0
        calls = self.traits.calls(tiles)
        for tile in calls:
            flops = self.sizes.flops(self.traits.computed_pairs(tile), backward=backward)
            slower = short if self.traits.is_short(tile) else 1.0
            seconds += (call_seconds + flops / rate) * slower
            if not (alone and len(calls) == 1):
                seconds += self.merged_bytes(tile, backward) / self.cluster.memory_bytes_per_second
        return seconds

    def merged_bytes(self, tile: Tile, backward: bool) -> int:
        """Read and written when a call's results join the others."""
        sizes = self.sizes
        touched = sizes.itemsize + 2 * sizes.sum_itemsize
        nq, nk = tile.q1 - tile.q0, tile.k1 - tile.k0
        if backward:
            return touched * (nq * sizes.q_numbers + nk * sizes.kv_numbers)
        return touched * nq * sizes.out_numbers + 8 * nq * sizes.lse_bytes

    def kv_bytes(self, rows: int) -> int:
        """Of a message of keys and values."""
        return rows * self.sizes.kv_numbers * self.sizes.itemsize

    def gradient_bytes(self, rows: int, wide: bool) -> int:
        """Of a message of their gradients."""
        item = self.sizes.sum_itemsize if wide else self.sizes.itemsize
        return rows * self.sizes.kv_numbers * item
