"""Kept fraction: what N ranks of one thread do of what one process does with as many threads."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from benchmarks.harness import (
    Contestant,
    Measurement,
    OtherLoad,
    describe_processes,
    kept_fraction,
    measure,
    rounds,
)
from benchmarks.processes import Processes
from benchmarks.progress import Waiting
from benchmarks.rows import Row, make_row
from benchmarks.work import OPS, Work, context_parallel, gather, held_tokens, layout_of, relative_l2
from benchmarks.work import sdpa as make_sdpa

DENSE = [
    ("zigzag order", "direct"),
    ("zigzag order", "ring"),
    ("zigzag order", "all_gather"),
    ("zigzag contiguous", "direct"),
    ("zigzag contiguous", "ring"),
    ("zigzag contiguous", "all_gather"),
    ("ring", "direct"),
    ("ring", "ring"),
    ("ring", "all_gather"),
]
VARLEN = [("varlen", "direct"), ("varlen", "ring"), ("varlen", "all_gather")]
WINDOW = [("zigzag order", "direct"), ("ring", "direct"), ("ring", "ring"), ("ring", "all_gather")]

RESULTS = ("out", "dq", "dk", "dv")


class Where(NamedTuple):
    """The processes that compete: ranks of one thread, and one process with all threads."""

    ranks: Processes
    single: Processes


def works(quick: bool) -> list[Work]:
    """What is measured."""
    if quick:
        return [
            Work(1024, 2, 2),
            Work(1024, 4, 2, "bfloat16", backward=False),
            Work(1024, 2, 2, documents=8),
            Work(1024, 2, 2, window=128),
        ]
    dense = [(4096, 8, 8), (16384, 4, 4), (32768, 2, 2), (4096, 8, 2), (16384, 8, 2)]
    of_one_dtype = [
        *(Work(*size) for size in dense),
        *(Work(16384, 4, 4, documents=documents) for documents in (8, 64)),
        Work(16384, 4, 4, window=1024),
    ]
    return [
        replace(work, dtype=dtype, backward=backward)
        for dtype in ("float32", "bfloat16")
        for work in of_one_dtype
        for backward in (False, True)
    ]


def run(chosen: Sequence[Work], *, reps: int, cores: int, waiting: Waiting) -> Iterator[Row]:
    """The rows of all contestants, case by case."""
    if not chosen:
        return
    with Processes(2) as ranks, Processes(1, threads=cores) as single:
        where = Where(ranks, single)
        for work in chosen:
            contestants = contestants_of(work, where)
            with waiting.task(work.name, rounds(len(contestants), reps=reps)) as advance:
                load = OtherLoad(where)
                measured = measure(contestants, reps=reps, advance=advance)
                other_cores = load.cores()
            for contestant in contestants:
                yield _row(work, contestant, contestants, measured, other_cores)


def contestants_of(work: Work, where: Where) -> list[Contestant]:
    """Baselines first; the first one computes exactly the work."""
    plain = Contestant("F.sdpa, one process", where.single, make_sdpa, (work,), baseline=True)
    if work.window is not None:
        alone = ("ring", "direct")
        baselines = [
            Contestant(
                "ring without a group, one process",
                where.single,
                context_parallel,
                (work, *alone),
                baseline=True,
            ),
            plain._replace(name="F.sdpa, one process, FULL CAUSAL instead of the window"),
        ]
        pairs = WINDOW
    elif work.documents > 1:
        baselines = [plain._replace(name="F.sdpa, one process, documents one by one")]
        pairs = VARLEN
    else:
        heads_first = plain._replace(name=f"{plain.name}, heads first", args=(work, True))
        baselines = [plain, heads_first]
        pairs = DENSE
    ours = [
        Contestant(f"{op}, {exchange}", where.ranks, context_parallel, (work, op, exchange))
        for op, exchange in pairs
    ]
    return [*baselines, *ours]


def _row(
    work: Work,
    contestant: Contestant,
    contestants: Sequence[Contestant],
    measured: dict[str, Measurement],
    other_cores: float | None,
) -> Row:
    samples = measured[contestant.name].samples
    results: dict[str, Any] = {
        "kept_fraction": {
            baseline.name: kept_fraction(measured[baseline.name].samples, samples)
            for baseline in contestants
            if baseline.baseline and baseline is not contestant
        },
        "relative_l2_to_baseline": None,
        "other_cores_busy": other_cores,
    }
    if not contestant.baseline:
        results["relative_l2_to_baseline"] = _difference(
            work, contestant, measured[contestant.name], measured[contestants[0].name]
        )
    parameters = {**work.parameters(), **describe_processes(contestant.processes)}
    if not contestant.baseline:
        _, op, exchange = contestant.args
        parameters |= {"op": op, "exchange": exchange}
    return make_row("speed", contestant.name, parameters, samples=samples, results=results)


def _difference(
    work: Work, contestant: Contestant, ours: Measurement, baseline: Measurement
) -> dict[str, float]:
    world_size = contestant.processes.size
    layout = layout_of(OPS[contestant.args[1]].layout, work.tokens, world_size)
    positions = [held_tokens(layout, rank) for rank in range(world_size)]
    pairs = zip(gather(ours.results, positions), baseline.results[0], strict=True)
    return {name: relative_l2(*pair) for name, pair in zip(RESULTS, pairs, strict=False)}
