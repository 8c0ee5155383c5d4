"""A program for people to read: who posts what, when; one action a line, 100 columns at most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nnscaler_ring.core.exchange.program import (
    OWN,
    Action,
    Add,
    Compute,
    Free,
    Gather,
    Join,
    Post,
    Program,
    Receive,
    Scatter,
    Send,
    Wait,
)

WIDTH = 100


def listing(program: Program, *, backward: bool) -> Iterator[str]:
    """The lines of one pass: a head, then every action, made when it is asked for."""
    name = "backward" if backward else "forward"
    rank, lens = program.rank, program.k_lens
    yield f"rank {rank} of {len(lens)}, {name}; place {OWN} holds its {lens[rank]:,} rows"
    for action in program.actions(backward=backward):
        for line in _lines(action):
            yield line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..."


def _lines(action: Action) -> Iterator[str]:
    match action:
        case Post():
            when = {None: "", "kinds": "  [gloo only]", "order": "  [NCCL only]"}[action.only]
            name = f"  post {action.transfer}"
            sides: list[Send | Receive] = [*action.sends, *action.receives]
            for side in sides:
                yield f"{name:<11}{_message(side, action.carries)}{when}"
                name = ""
            if not sides:
                yield f"{name:<11}nothing{when}"
        case Wait():
            yield f"  wait {action.transfer}"
        case Compute():
            pairs = sum(tile.pairs() for tile in action.tiles)
            taken = "" if action.taken is None else f", of {len(action.taken)} slices of it"
            where = f"place {action.place}: {len(action.tiles)} tiles, {pairs:,} pairs{taken}"
            yield f"  compute  {where}"
        case Free():
            yield f"  free     place {action.place}"
        case Add():
            where = f"the sums of place {action.to}, {_runs(action.rows)}"
            yield f"  add      place {action.place} to {where}"
        case Join():
            sources = ", ".join(str(place) for place in dict.fromkeys(p for p, *_ in action.pieces))
            yield f"  join     places {sources} to place {action.place}"
        case Gather():
            yield f"  gather   the keys of all ranks into place {action.place}"
        case Scatter():
            yield f"  scatter  the sums of place {action.place} to their owners"


def _message(side: Send | Receive, carries: str) -> str:
    wide = ", summed" if side.wide else ""
    if isinstance(side, Send):
        return f"send {carries} to {side.to}: place {side.place}, {_runs(side.rows)}{wide}"
    sources = dict.fromkeys(source for source, _, _ in side.rows)
    whose = ", ".join(f"rank {source}" for source in sources)
    rows = _runs([(start, stop) for _, start, stop in side.rows])
    return f"receive {carries} from {side.sender} into place {side.place}: {whose}, {rows}{wide}"


def _runs(rows: Sequence[tuple[int, int]]) -> str:
    if len(rows) == 1:
        return f"rows {rows[0][0]:,} to {rows[0][1]:,}"
    return f"{sum(stop - start for start, stop in rows):,} rows in {len(rows)} runs"
