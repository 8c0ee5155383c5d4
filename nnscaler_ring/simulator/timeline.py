"""When every rank computes, sends, receives and waits, in one pass of one attention layer.

Note [How time passes]
    Ranks follow the order of core/exchange: a transfer is posted one step before it is needed
    and starts once both sides have posted it and the links of both are free; the rank waits for
    what it needs next. Gradients leave after their step and are waited for a step later. With
    overlap o, the part 1 - o of a transfer takes the rank's own time: on a CPU
    the cores that compute also move the messages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from nnscaler_ring.simulator.call import SimulatedCall
from nnscaler_ring.simulator.cluster import Cluster
from nnscaler_ring.simulator.memory import KernelTraits
from nnscaler_ring.simulator.work import Costs, RankWork, StepWork, rank_work, ring_work


class Event(NamedTuple):
    """What a rank does from `start` to `end`, in seconds from the pass's beginning."""

    kind: Literal["compute", "transfer", "wait"]
    start: float
    end: float
    what: str


@dataclass
class RankTimeline:
    """One rank's events; `transfer` events overlap with the others, which follow each other."""

    rank: int
    events: list[Event] = field(default_factory=list)
    now: float = 0.0
    link_free: float = 0.0

    def spend(self, kind: Literal["compute", "wait"], until: float, what: str) -> None:
        """The rank does one thing until some time."""
        if until > self.now:
            self.events.append(Event(kind, self.now, until, what))
            self.now = until

    def seconds(self, kind: str) -> float:
        """Spent on one kind of event."""
        return sum(event.end - event.start for event in self.events if event.kind == kind)


@dataclass(frozen=True)
class Timeline:
    """All ranks in one pass."""

    ranks: tuple[RankTimeline, ...]

    @property
    def seconds(self) -> float:
        """Until the last rank is done."""
        return max(rank.now for rank in self.ranks)

    @property
    def overlap(self) -> float:
        """The part of all transfer time during which no rank waited: 1 is all hidden."""
        moving = sum(rank.seconds("transfer") for rank in self.ranks)
        waiting = sum(min(rank.seconds("wait"), rank.seconds("transfer")) for rank in self.ranks)
        return 1.0 - waiting / moving if moving else 1.0


def simulate_timeline(
    call: SimulatedCall, cluster: Cluster, traits: KernelTraits, *, backward: bool
) -> Timeline:
    """The timeline of every rank: O(ranks^2) steps, for up to some hundred ranks."""
    costs = Costs(call.sizes, cluster, traits)
    if call.exchange == "all_gather":
        return _all_gather(call, costs, backward)
    ring = call.exchange == "ring"
    works = [
        ring_work(call, rank) if ring else rank_work(call, rank, backward=backward)
        for rank in range(call.ranks)
    ]
    return run_steps(works, costs, backward=backward, ring=ring)


def run_steps(works: Sequence[RankWork], costs: Costs, *, backward: bool, ring: bool) -> Timeline:
    """Let ranks run their steps side by side. One rank's work alone: its peers are like it."""
    lines = [RankTimeline(work.rank) for work in works]
    at = {work.rank: n for n, work in enumerate(works)}
    run = _Run(works, lines, costs, ring, lambda rank: at.get(rank, 0))
    alone = all(not work.steps for work in works)
    arrived = run.post(0)
    for work, line in zip(works, lines, strict=True):
        seconds = costs.seconds(work.local, backward=backward, alone=alone)
        line.spend("compute", line.now + seconds, "own keys")
    homebound: list[float] = [0.0] * len(works)
    for number in range(max(len(work.steps) for work in works)):
        for line, when in zip(lines, arrived, strict=True):
            line.spend("wait", when, f"keys of step {number + 1}")
        following = run.post(number + 1)
        for work, line in zip(works, lines, strict=True):
            if number < len(work.steps):
                tiles = work.steps[number].tiles
                seconds = costs.seconds(tiles, backward=backward)
                line.spend("compute", line.now + seconds, f"step {number + 1}")
        if backward:
            home = run.send_home(number)
            for line, when in zip(lines, homebound, strict=True):
                line.spend("wait", when, f"gradients of step {number}")
            homebound = home
        arrived = following
    for line, when in zip(lines, homebound, strict=True):
        line.spend("wait", when, "gradients")
    return Timeline(tuple(lines))


@dataclass
class _Run:
    works: Sequence[RankWork]
    lines: list[RankTimeline]
    costs: Costs
    ring: bool
    index: Callable[[int], int]

    def post(self, number: int) -> list[float]:
        """Post a step's keys on every rank; when they and the rank's own sends are done."""
        costs = self.costs

        def size(step: StepWork, out: bool) -> int:
            return costs.kv_bytes(step.rows_out if out else step.rows_in)

        return self._move(number, size, "source", f"keys of step {number + 1}")

    def send_home(self, number: int) -> list[float]:
        """Post the gradients of a step's keys."""
        costs = self.costs

        def size(step: StepWork, out: bool) -> int:
            rows, wide = (step.rows_in, step.wide_in) if out else (step.rows_out, step.wide_out)
            return costs.gradient_bytes(rows, wide)

        sender: Literal["source", "target"] = "source" if self.ring else "target"
        return self._move(number, size, sender, f"gradients of step {number + 1}")

    def _move(
        self,
        number: int,
        size: Callable[[StepWork, bool], int],
        sender: Literal["source", "target"],
        what: str,
    ) -> list[float]:
        """Messages of one step; `sender` names the field of the rank that sends to this one."""
        cluster = self.costs.cluster
        posted = [line.now for line in self.lines]
        done = list(posted)
        for n, (work, line) in enumerate(zip(self.works, self.lines, strict=True)):
            if number >= len(work.steps):
                continue
            step = work.steps[number]
            peers = (step.source, step.target)
            origin, goal = peers if sender == "source" else peers[::-1]
            seconds = cluster.link(work.rank, origin).seconds(size(step, False))
            out_seconds = cluster.link(work.rank, goal).seconds(size(step, True))
            longest = max(seconds, out_seconds)
            if not longest:
                continue
            start = max(posted[n], posted[self.index(origin)], line.link_free)
            end = start + longest
            line.link_free = end
            line.events.append(Event("transfer", start, end, what))
            done[n] = end
            # Note [How time passes]: this part takes the rank's own time.
            own = (1 - cluster.overlap) * (seconds + out_seconds)
            line.spend("compute", line.now + own, f"moving {what}")
        return done


def _all_gather(call: SimulatedCall, costs: Costs, backward: bool) -> Timeline:
    lines = [RankTimeline(rank) for rank in range(call.ranks)]
    for line in lines:
        tiles = tuple(call.schedule.tiles(line.rank, range(call.ranks)))
        gather_then_compute(
            call, line, costs.seconds(tiles, backward=backward, alone=True), costs, backward
        )
    return Timeline(tuple(lines))


def gather_then_compute(
    call: SimulatedCall, line: RankTimeline, seconds: float, costs: Costs, backward: bool
) -> None:
    """A rank's pass with the all-gather exchange: nothing overlaps.

    A collective goes around a ring, as fast as the slowest link in it.
    """
    ranks = call.ranks
    cluster = costs.cluster
    link = cluster.inside if ranks <= cluster.devices_per_node else cluster.between
    longest = max(call.schedule.k_lens)

    def move(size: int, what: str) -> None:
        # K and V each have a collective of their own.
        hops = 2 * (ranks - 1)
        until = line.now + hops * link.seconds(size / 2) * (2 - cluster.overlap)
        line.events.append(Event("transfer", line.now, until, what))
        line.spend("wait", until, what)

    move(costs.kv_bytes(longest), "all keys")
    line.spend("compute", line.now + seconds, "all keys")
    if backward:
        move(costs.gradient_bytes(longest, True), "all gradients")
