"""A fourth exchange, for tests: all needed rows in two stages, each from several ranks at once.

In stage s come the rows of all ranks whose number is s modulo 2, the last rank first. They are
joined to one place, computed together, and their gradients go home to several owners in one post.
"""

from collections.abc import Iterator

from nnscaler_ring.core.exchange import Exchange
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
from nnscaler_ring.core.plan.schedule import PairWork, Schedule, row_count

STAGES = 2


def toy(schedule: Schedule, rank: int, cut: Cut = USUAL) -> Program:
    own = Compute(OWN, ((rank, 0, schedule.k_lens[rank]),), tuple(schedule.tiles(rank, (rank,))))
    stages = [_Stage(schedule, rank, number) for number in range(STAGES)]
    forward = (*stages[0].keys(), own, *stages[0].arrive(), *stages[1].keys())
    forward = (*forward, *stages[0].compute(), *stages[1].arrive(), *stages[1].compute())
    backward = [*stages[0].keys(), own, *stages[0].arrive(), *stages[1].keys()]
    backward += [*stages[0].compute(), *stages[0].home(), *stages[1].arrive()]
    backward += [*stages[1].compute(), *stages[1].home()]
    backward += [*stages[0].settle(), *stages[1].settle()]
    return Program(rank, schedule.k_lens, forward, tuple(backward))


TOY = Exchange(toy)


class _Stage:
    """What travels, is computed and comes home in one stage, as seen by one rank."""

    def __init__(self, schedule: Schedule, rank: int, number: int) -> None:
        self.rank, self.first = rank, 100 * (number + 1)
        others = [n for n in reversed(range(schedule.world_size)) if n != rank]
        self.reads = [schedule.pair(rank, n) for n in others if n % STAGES == number]
        gives = [(n, schedule.pair(n, rank)) for n in others] if rank % STAGES == number else []
        self.gives = [(n, pair) for n, pair in gives if pair.rows]
        self.reads = [pair for pair in self.reads if pair.rows]

    def keys(self) -> Iterator[Action]:
        sends = tuple(Send(n, OWN, pair.rows, _whole(pair)) for n, pair in self.gives)
        receives = tuple(
            Receive(pair.source, self.first + n, _rows(pair), _whole(pair))
            for n, pair in enumerate(self.reads, start=1)
        )
        yield Post(self.first, "keys", sends, receives)

    def arrive(self) -> Iterator[Action]:
        yield Wait(self.first)
        if self.reads:
            pieces = enumerate(self.reads, start=1)
            yield Join(
                self.first, tuple((self.first + n, 0, row_count(pair.rows)) for n, pair in pieces)
            )
            yield from (Free(self.first + n) for n in range(1, len(self.reads) + 1))

    def compute(self) -> Iterator[Action]:
        if self.reads:
            tiles, offset = [], 0
            for pair in self.reads:
                tiles += [tile.keys_moved(offset) for tile in pair.tiles]
                offset += row_count(pair.rows)
            rows = tuple(run for pair in self.reads for run in _rows(pair))
            yield Compute(self.first, rows, tuple(tiles))
            yield Free(self.first)

    def home(self) -> Iterator[Action]:
        sends, offset = [], 0
        for pair in self.reads:
            rows = (offset, offset + row_count(pair.rows))
            sends.append(Send(pair.source, self.first, (rows,), False, True))
            offset = rows[1]
        receives = tuple(
            Receive(n, self.first + 50 + n, _rows(pair), False, True) for n, pair in self.gives
        )
        yield Post(self.first + 1, "gradients", tuple(sends), receives)

    def settle(self) -> Iterator[Action]:
        yield Wait(self.first + 1)
        for n, pair in self.gives:
            yield Add(self.first + 50 + n, OWN, pair.rows)


def _rows(pair: PairWork) -> tuple[tuple[int, int, int], ...]:
    return tuple((pair.source, *run) for run in pair.rows)


def _whole(pair: PairWork) -> bool:
    return row_count(pair.rows) == pair.source_len
