"""When every rank computes, sends, receives and waits, in one pass of one attention layer.

Note [How time passes]
    Every rank goes through its program. A transfer starts once both sides of all its messages have
    posted them and the rank's transfer before it is done; messages in and out go beside each other,
    those of one direction one after another. A rank that waits for a transfer first waits for the
    peer that has not posted yet ("late": it computes longer than this rank), then for the bytes
    ("wait": the link is too slow). With overlap o, the part 1 - o of a transfer takes the rank's
    own time: on a CPU the cores that compute also move the messages. A collective starts when all
    ranks are there and goes around a ring, as fast as the slowest link in it; nothing overlaps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, NamedTuple

from nnscaler_ring.core.exchange import Program
from nnscaler_ring.core.exchange.program import (
    OWN,
    Action,
    Compute,
    Gather,
    Join,
    Post,
    Scatter,
    Wait,
    performed,
)
from nnscaler_ring.simulator.call import SimulatedCall
from nnscaler_ring.simulator.cluster import Cluster
from nnscaler_ring.simulator.costs import Costs
from nnscaler_ring.simulator.memory import KernelTraits

EventKind = Literal["compute", "transfer", "wait", "late"]


class Event(NamedTuple):
    """What a rank does from `start` to `end`, in seconds from the pass's beginning."""

    kind: EventKind
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
    keeps_events: bool = True
    """False: only their sums, for those who estimate."""
    _sums: dict[str, float] = field(default_factory=dict)

    def spend(self, kind: EventKind, until: float, what: str) -> None:
        """The rank does one thing until some time."""
        if until > self.now:
            self.note(kind, self.now, until, what)
            self.now = until

    def note(self, kind: EventKind, start: float, end: float, what: str) -> None:
        """Something goes on from `start` to `end`."""
        self._sums[kind] = self._sums.get(kind, 0.0) + end - start
        if self.keeps_events:
            self.events.append(Event(kind, start, end, what))

    def seconds(self, kind: str) -> float:
        """Spent on one kind of event."""
        return self._sums.get(kind, 0.0)


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
        """The part of all transfer time during which no rank waited for it: 1 is all hidden."""
        moving = sum(rank.seconds("transfer") for rank in self.ranks)
        waiting = sum(min(rank.seconds("wait"), rank.seconds("transfer")) for rank in self.ranks)
        return 1.0 - waiting / moving if moving else 1.0


def simulate_timeline(
    call: SimulatedCall, cluster: Cluster, traits: KernelTraits, *, backward: bool
) -> Timeline:
    """The timeline of every rank, for up to some hundred ranks."""
    programs = {rank: call.program(rank) for rank in range(call.ranks)}
    return run_programs(programs, Costs(call.sizes, cluster, traits), backward=backward)


def run_programs(
    programs: Mapping[int, Program], costs: Costs, *, backward: bool, keeps_events: bool = True
) -> Timeline:
    """Let ranks perform their programs side by side.

    Peers that have no program here are like the rank that talks to them: never late.
    """
    board = _Board(set(programs), Counter(), {})
    ranks = [_Rank(program, board, costs, backward) for program in programs.values()]
    for rank in ranks:
        rank.line.keeps_events = keeps_events
    running = ranks
    while running:
        before = board.progress
        running = [rank for rank in running if not rank.runs_through()]
        assert not running or board.progress > before, "the ranks wait for each other"
    return Timeline(tuple(rank.line for rank in ranks))


@dataclass
class _Board:
    """What every rank can see: who posted which message, or came to which collective, when."""

    present: set[int]
    counts: Counter[tuple[object, ...]]
    posted: dict[tuple[object, ...], float]
    progress: int = 0

    def post(self, what: tuple[object, ...], when: float) -> tuple[object, ...]:
        """Number it among those of its kind, and write it down."""
        key = (*what, self.counts[what])
        self.counts[what] += 1
        self.posted[key] = when
        return key


class _Transfer(NamedTuple):
    """A post under way: the other sides that it needs, and how long each direction takes."""

    number: int
    posted: float
    needs: tuple[tuple[object, ...], ...]
    seconds: float
    what: str


class _Rank:
    """One rank on its way through its program."""

    def __init__(self, program: Program, board: _Board, costs: Costs, backward: bool) -> None:
        self.line = RankTimeline(program.rank)
        self._program, self._board, self._costs = program, board, costs
        self._backward = backward
        actions = program.actions(backward=backward)
        computed = (action for action in actions if isinstance(action, Compute))
        self._alone = len([*islice(computed, 2)]) == 1
        self._waiting: list[_Transfer] = []  # in the order of posts
        self._done: dict[int, tuple[float, float]] = {}  # when the peers were there; the end
        self._rest = self._run(performed(actions, in_order=True))

    def runs_through(self) -> bool:
        """Go on until a peer is needed that is not there yet; whether this is the end."""
        return next(self._rest, None) is None

    def _run(self, actions: Iterator[Action]) -> Iterator[bool]:
        line, costs = self.line, self._costs
        for action in actions:
            self._board.progress += 1
            match action:
                case Compute():
                    seconds = costs.seconds(
                        action.tiles, backward=self._backward, alone=self._alone
                    )
                    what = "own keys" if action.place == OWN else f"keys {action.place}"
                    line.spend("compute", line.now + seconds, what)
                case Post():
                    self._post(action)
                case Wait():
                    while action.transfer not in self._done:
                        if not self._advance():
                            yield True
                    there, end = self._done.pop(action.transfer)
                    if there > line.now:
                        line.spend("late", there, f"peers of transfer {action.transfer}")
                    if end > line.now:
                        line.spend("wait", end, f"transfer {action.transfer}")
                case Gather() | Scatter():
                    yield from self._collective(isinstance(action, Scatter))
                case Join():
                    rows = sum(stop - start for _, start, stop in action.pieces)
                    seconds = 2 * costs.kv_bytes(rows) / costs.cluster.memory_bytes_per_second
                    line.spend("compute", line.now + seconds, f"joining keys {action.place}")

    def _post(self, action: Post) -> None:
        line, costs, rank = self.line, self._costs, self._program.rank
        cluster = costs.cluster
        posted = line.now
        needs = []
        seconds = [0.0, 0.0]
        sides = [(0, send.to, send.length, send.wide) for send in action.sends]
        sides += [(1, some.sender, some.length, some.wide) for some in action.receives]
        for side, peer, rows, wide in sides:
            keys = action.carries == "keys"
            size = costs.kv_bytes(rows) if keys else costs.gradient_bytes(rows, wide)
            seconds[side] += cluster.link(rank, peer).seconds(size)
            if peer in self._board.present:
                pair = (rank, peer) if side == 0 else (peer, rank)
                key = self._board.post((action.carries, *pair, side), posted)
                if rows:  # an empty message is not sent
                    needs.append((*key[:3], 1 - side, key[4]))
        what = f"{action.carries} {action.transfer}"
        transfer = _Transfer(action.transfer, posted, tuple(needs), max(seconds), what)
        self._waiting.append(transfer)
        # Note [How time passes]: this part takes the rank's own time.
        if cluster.overlap < 1:
            own = (1 - cluster.overlap) * sum(seconds)
            line.spend("compute", line.now + own, f"moving {what}")

    def _advance(self) -> bool:
        """Finish the next transfer in order; False: a peer has not posted its side."""
        transfer = self._waiting[0]
        known = self._board.posted
        if any(need not in known for need in transfer.needs):
            return False
        del self._waiting[0]
        there = max([transfer.posted, *(known[need] for need in transfer.needs)])
        start = max(there, self.line.link_free)
        end = start + transfer.seconds
        if transfer.seconds:
            self.line.link_free = end
            self.line.note("transfer", start, end, transfer.what)
        self._done[transfer.number] = there, end
        return True

    def _collective(self, scatters: bool) -> Iterator[bool]:
        line, costs, board = self.line, self._costs, self._board
        cluster, lens = costs.cluster, self._program.k_lens
        ranks, longest = len(lens), max(lens)
        what = "all gradients" if scatters else "all keys"
        mine = board.post((what, line.rank), line.now)
        others = [(what, rank, mine[-1]) for rank in board.present]
        while any(key not in board.posted for key in others):
            yield True
        line.spend("late", max(board.posted[key] for key in others), f"ranks before {what}")
        link = cluster.inside if ranks <= cluster.devices_per_node else cluster.between
        size = costs.gradient_bytes(longest, True) if scatters else costs.kv_bytes(longest)
        # K and V each have a collective of their own.
        seconds = 2 * (ranks - 1) * link.seconds(size / 2) * (2 - cluster.overlap)
        line.note("transfer", line.now, line.now + seconds, what)
        line.spend("wait", line.now + seconds, what)
