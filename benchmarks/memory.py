"""Memory of a forward and a backward pass above its inputs, in multiples of the local q tensor.

Two figures, because they see different things. Counted: the largest sum of live tensor bytes,
replayed from the allocation events of PyTorch's CPU allocator; whatever malloc does, and without
what libraries and other threads allocate. Peak RSS: what the process held at most, as the
kernel saw it; with everything, fragmentation too.

Above q, k, v and dout; out, dq, dk and dv are included. Tables also give it less dq, dk, dv.
"""

import ctypes
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.processes import Processes, Worker
from benchmarks.progress import Waiting
from benchmarks.rows import Row, make_row
from benchmarks.work import OPS, Run, Work, make_run, our_attention, sdpa_attention

SDPA = "F.sdpa"
OURS = [
    (op, exchange)
    for op in ("zigzag order", "zigzag contiguous")
    for exchange in ("direct", "ring", "all_gather")
]
ALLOCATORS = {
    "default": {},
    "mmap": {"MALLOC_MMAP_THRESHOLD_": "131072"},
}
WARM_UP_TOKENS = 64


class Way(NamedTuple):
    """Who computes the work, and with what."""

    world_size: int
    threads: int
    op: str
    exchange: str

    @property
    def name(self) -> str:
        """For people."""
        return self.op if self.op == SDPA else f"{self.op}, {self.exchange}"


def ways(quick: bool, cores: int) -> list[Way]:
    """One process, then the ranks."""
    world_sizes, pairs = ([2], OURS[:1]) if quick else ([2, 4], OURS)
    ranks = [Way(size, 1, op, exchange) for size in world_sizes for op, exchange in pairs]
    return [Way(1, cores, SDPA, ""), *ranks]


def run(work: Work, chosen: Sequence[Way], *, waiting: Waiting) -> Iterator[Row]:
    """A row per way; each allocator has fresh processes."""
    for way in chosen:
        name = f"memory, {way.world_size} processes: {way.name}"
        with waiting.task(name, len(ALLOCATORS)) as advance:
            by_rank: list[dict[str, int]] = [{} for _ in range(way.world_size)]
            for allocator, environment in ALLOCATORS.items():
                with Processes(way.world_size, threads=way.threads, environment=environment) as p:
                    # malloc does not change what is counted: once is enough.
                    functions = [take_rss] if by_rank[0] else [take_rss, take_counted]
                    for function in functions:
                        for figures, some in zip(by_rank, p.call(function, work, way), strict=True):
                            figures.update({name.format(allocator): n for name, n in some.items()})
                advance()
            yield _row(work, way, by_rank)


def _row(work: Work, way: Way, by_rank: list[dict[str, int]]) -> Row:
    local_q = work.tokens // way.world_size * work.num_heads * work.head_dim
    local_q_bytes = local_q * work.torch_dtype.itemsize
    worst = {name: max(one[name] for one in by_rank) for name in by_rank[0]}
    results: dict[str, Any] = {
        "local_q_bytes": local_q_bytes,
        "by_rank": by_rank,
        "worst_rank_in_local_q": {
            name.removesuffix("_bytes"): n / local_q_bytes for name, n in worst.items()
        },
    }
    parameters = {
        **work.parameters(),
        "op": way.op,
        "exchange": way.exchange,
        "processes": way.world_size,
        "threads_per_process": way.threads,
        "environments": ALLOCATORS,
    }
    return make_row("memory", way.name, parameters, results=results)


def take_rss(worker: Worker, work: Work, way: Way) -> dict[str, int]:
    """Peak RSS of this process after a tiny call that starts threads and connections."""
    _make(worker, replace(work, tokens=WARM_UP_TOKENS * worker.world_size), way)()
    return {"rss_{}_bytes": peak_rss_bytes(_make(worker, work, way))}


def take_counted(worker: Worker, work: Work, way: Way) -> dict[str, int]:
    """Counted bytes of this process."""
    return count_live_bytes(_make(worker, work, way))._asdict()


def _make(worker: Worker, work: Work, way: Way) -> Run:
    tensors = work.tensors(work.tokens // worker.world_size)
    if way.op == SDPA:
        return make_run(work, sdpa_attention(work), tensors)
    assert way.op in OPS, way
    return make_run(work, our_attention(worker, work, way.op, way.exchange), tensors)


class Counted(NamedTuple):
    """Bytes of tensors: the peak is between the first two; `gradient_bytes` are dq, dk and dv.

    A deallocation is missed where another thread drops the last reference, as gloo's threads may
    after a collective. What was missed is `left_over_bytes`, alive though all results are dropped,
    and the peak is at most that much too high.
    """

    counted_at_least_bytes: int
    counted_bytes: int
    gradient_bytes: int
    left_over_bytes: int


def count_live_bytes(measured_run: Callable[[], Sequence[torch.Tensor]]) -> Counted:
    """Replay the allocations of a run; tensors that were there before do not count.

    Every tensor counts that this thread makes, however deep inside an op, with the bytes asked for.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        results = measured_run()
        gradients = sum(x.untyped_storage().nbytes() for x in results[1:])
        del results
        gc.collect()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return Counted(peak - live, peak, gradients, live)


def peak_rss_bytes(measured_run: Callable[[], object]) -> int:
    """How much the peak of a run's resident set is above what was resident before it (Linux)."""
    gc.collect()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # free heap that is still resident would hide a part
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status_bytes("VmRSS")
    results = measured_run()
    peak = _status_bytes("VmHWM")
    del results
    return peak - before


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(f"/proc/self/status has no {name}.")
