"""Memory of a forward and a backward pass above its inputs, in multiples of the local q tensor.

Two figures, because they see different things. Counted: the largest sum of live tensor bytes, see
Note [Counted bytes] in nnscaler_ring/tools/demo/memory.py; without what libraries allocate. Peak
RSS: what the process held at most, as the kernel saw it; with everything, fragmentation too.

Above q, k, v and dout; out, dq, dk and dv are included. Tables also give it less dq, dk, dv.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from benchmarks.processes import Processes, Worker
from benchmarks.progress import Waiting
from benchmarks.rows import Row, make_row
from benchmarks.work import OPS, Run, Work, make_run, our_attention, sdpa_attention
from nnscaler_ring.tools.demo.memory import count_tensor_bytes, reset_resident_peak, status_bytes

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

    What is alive though all results are dropped, `left_over_bytes`, was missed in counting.
    """

    counted_at_least_bytes: int
    counted_bytes: int
    gradient_bytes: int
    left_over_bytes: int


def count_live_bytes(measured_run: Callable[[], Sequence[torch.Tensor]]) -> Counted:
    """Of a run, and of its results from the second on."""
    gradients = 0

    def run() -> None:
        nonlocal gradients
        gradients = sum(x.untyped_storage().nbytes() for x in measured_run()[1:])

    peak, left_over = count_tensor_bytes(run)
    return Counted(peak - left_over, peak, gradients, left_over)


def peak_rss_bytes(measured_run: Callable[[], object]) -> int:
    """How much the peak of a run's resident set is above what was resident before it (Linux)."""
    gc.collect()
    if not reset_resident_peak():
        raise RuntimeError("the peak of resident memory needs Linux and glibc.")
    before = status_bytes("VmRSS")
    results = measured_run()
    peak = status_bytes("VmHWM")
    del results
    return peak - before
