"""Interleaved runs: A B C A B C ..., so that what changes on the machine meets all alike."""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from benchmarks.processes import Processes, forget, prepare, run_once, time_once

PAUSE_SECONDS = 0.05  # longer than idle OpenMP threads spin before they sleep


class Contestant(NamedTuple):
    """Something to time: `make(worker, *args)` gives each worker its run, a callable.

    The times of the others are compared with those of a `baseline`.
    """

    name: str
    processes: Processes
    make: Callable[..., Callable[[], Sequence[Tensor]]]
    args: tuple[Any, ...] = ()
    baseline: bool = False


class Measurement(NamedTuple):
    """Seconds of each counted run, and the results by rank of the first run, which is not."""

    samples: list[float]
    results: list[list[Tensor]]


def measure(
    contestants: Sequence[Contestant],
    *,
    reps: int,
    warmup: int = 1,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Measurement]:
    """Time the contestants in turn; `advance` is called `rounds(...)` times.

    A run lasts from the moment the first rank begins, after a barrier, to the end of the last one.
    """
    measured = {}
    for contestant in contestants:
        contestant.processes.call(prepare, contestant.name, contestant.make, *contestant.args)
        results = contestant.processes.call(run_once, contestant.name)
        measured[contestant.name] = Measurement([], results)
        advance()
    for rep in range(warmup + reps):
        for contestant in contestants:
            seconds = _timed(contestant)
            if rep >= warmup:
                measured[contestant.name].samples.append(seconds)
            advance()
    for contestant in contestants:
        contestant.processes.call(forget)
    return measured


def rounds(contestants: int, *, reps: int, warmup: int = 1) -> int:
    """How often `measure` calls `advance`."""
    return contestants * (1 + warmup + reps)


def _timed(contestant: Contestant) -> float:
    time.sleep(PAUSE_SECONDS)
    times = contestant.processes.call(time_once, contestant.name)
    return max(end for _, end in times) - min(start for start, _ in times)


def kept_fraction(baseline: Sequence[float], samples: Sequence[float]) -> dict[str, float]:
    """Baseline seconds over ours: 1 is what the same cores do without any exchange.

    Of the medians, and the median and the extremes of the same ratio within each round.
    """
    by_round = [one / ours for one, ours in zip(baseline, samples, strict=True)]
    return {
        "of_medians": statistics.median(baseline) / statistics.median(samples),
        "by_round_median": statistics.median(by_round),
        "by_round_min": min(by_round),
        "by_round_max": max(by_round),
    }


class OtherLoad:
    """How many cores other processes kept busy since this was made (Linux; else None)."""

    def __init__(self, processes: Sequence[Processes]) -> None:
        self._pids = [os.getpid(), *(pid for some in processes for pid in some.pids)]
        self._wall = time.monotonic()
        self._busy = self._other_seconds()

    def cores(self) -> float | None:
        """The average."""
        busy = self._other_seconds()
        if busy is None or self._busy is None:
            return None
        # The clock ticks of two files differ by a few, so idle could come out below 0.
        return max(0.0, round((busy - self._busy) / (time.monotonic() - self._wall), 2))

    def _other_seconds(self) -> float | None:
        machine = Path("/proc/stat")
        if not machine.exists():
            return None
        # user nice system idle iowait irq softirq steal, in clock ticks
        ticks = [int(field) for field in machine.read_text().splitlines()[0].split()[1:9]]
        ours = sum(_ticks_of(pid) for pid in self._pids)
        return (sum(ticks) - ticks[3] - ticks[4] - ours) / os.sysconf("SC_CLK_TCK")


def _ticks_of(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def describe_processes(processes: Processes) -> Mapping[str, int]:
    """For a row's parameters."""
    return {"processes": processes.size, "threads_per_process": processes.threads}
