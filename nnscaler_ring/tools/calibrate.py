"""Measures this machine for the simulator: kernels, merging, messages; and predictions beside runs.

Two ranks measure side by side, because that is how they will compute: they share memory bandwidth
and, on a CPU, the cores that also move messages.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler_ring import traffic, wrap_ring_attn_func, wrap_zigzag_attn_func
from nnscaler_ring.core.device import device_name
from nnscaler_ring.core.kernels import BackwardTensors, select_kernel
from nnscaler_ring.core.plan.schedule import Window
from nnscaler_ring.core.plan.tile import Tile, trim
from nnscaler_ring.core.ranks.groups import find_place, group_string
from nnscaler_ring.core.ranks.transport import Message, Transport
from nnscaler_ring.core.scores.scores import TileScores
from nnscaler_ring.core.sizes import Sizes
from nnscaler_ring.core.sums.online_softmax import merge_
from nnscaler_ring.simulator.call import SimulatedCall
from nnscaler_ring.simulator.cluster import Cluster, Link, Rates
from nnscaler_ring.simulator.memory import KernelTraits, predict_memory, traits_of
from nnscaler_ring.simulator.timeline import simulate_timeline
from nnscaler_ring.tools.demo.memory import count_tensor_bytes
from nnscaler_ring.tools.launch import Rank, run_ranks

RANKS = 2
DTYPES = ("float32", "bfloat16")
HEADS, HEAD_DIM = 4, 64
CALLS = ((768, 1024), (1024, 1024), (1024, 2048), (2048, 1024), (2048, 2048))
SHORT_CALLS = ((256, 768), (256, 1792))
BANDS = ((256, 512, 0), (256, 256, 128), (256, 768, 100))
"""Short calls, as windows have them: queries, keys, and how far a band reaches to the left."""

MESSAGE_BYTES = (4 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20)
MERGED_ROWS = (64, 256, 1024, 4096)
REPEATS = 5


@dataclass(frozen=True)
class Case:
    """A run to predict: one call of a public op over two ranks, zigzag shards in zigzag order."""

    tokens: int
    layout: str
    mask: Window
    exchange: str = "direct"
    dtype: str = "float32"
    kv_heads: int = HEADS

    @property
    def name(self) -> str:
        """In a few words."""
        mask = "causal" if self.mask.right == 0 else "full"
        if self.mask.left < self.tokens:
            mask += f" window {self.mask.left}"
        heads = f"h{HEADS}:{self.kv_heads}"
        return f"{self.layout} {mask} {self.tokens} {heads} {self.dtype} {self.exchange}"

    def call(self) -> SimulatedCall:
        """As the simulator sees it."""
        sizes = Sizes(HEADS, self.kv_heads, HEAD_DIM, HEAD_DIM, self.dtype)
        return SimulatedCall(
            self.tokens, RANKS, sizes, self.mask, self.layout, exchange=self.exchange
        )


CAUSAL, FULL = Window(right=0), Window()
CASES = (
    Case(4096, "zigzag", CAUSAL),
    Case(8192, "zigzag", CAUSAL),
    Case(16384, "zigzag", CAUSAL),
    Case(8192, "zigzag", CAUSAL, exchange="ring"),
    Case(8192, "zigzag", CAUSAL, exchange="all_gather"),
    Case(8192, "zigzag", CAUSAL, kv_heads=2),
    Case(8192, "zigzag", CAUSAL, dtype="bfloat16"),
    Case(4096, "zigzag", FULL),
    Case(8192, "contiguous", CAUSAL),
    Case(8192, "contiguous", FULL),
    Case(8192, "contiguous", FULL, exchange="ring"),
    Case(16384, "contiguous", Window(1024, 0)),
    Case(16384, "zigzag", Window(2048, 0)),
)


def calibrate(advance: Callable[[str], object] = lambda what: None) -> Cluster:
    """Measure this machine's CPU and describe it as a cluster; `advance(what)` after each part."""
    rates = {}
    for dtype in DTYPES:
        rates[dtype] = _rates(dtype)
        advance(f"kernels in {dtype}")
    per_rank = run_ranks(RANKS, _measure_moving, timeout_seconds=600.0)
    bandwidth = statistics.mean(figures["merge_bytes_per_second"] for figures in per_rank)
    merging = statistics.mean(figures["merge_seconds"] for figures in per_rank)
    rates = {
        dtype: replace(some, forward_call_seconds=some.forward_call_seconds + merging)
        for dtype, some in rates.items()
    }
    times = [max(samples) for samples in zip(*(f["messages"] for f in per_rank), strict=True)]
    latency, per_byte = _line(MESSAGE_BYTES, times)
    overlap = statistics.mean(figures["overlap"] for figures in per_rank)
    advance("messages")
    link = Link(1 / per_byte, max(latency, 1e-6))
    date = datetime.now(timezone.utc).date().isoformat()
    pages = _memory_bytes()
    return Cluster(
        name=f"this machine, {RANKS} CPU ranks of one thread",
        source=(
            f"Measured by nnscaler-ring bench --calibrate on {date}: {device_name('cpu')}, torch "
            f"{torch.__version__}, {RANKS} ranks over gloo, {HEADS} heads of {HEAD_DIM}."
        ),
        device_type="cpu",
        memory_bytes=pages / RANKS,
        memory_bytes_per_second=bandwidth,
        devices_per_node=RANKS,
        inside=link,
        between=link,
        overlap=overlap,
        rates=rates,
    )


def compare(
    cluster: Cluster,
    cases: Sequence[Case] = CASES,
    advance: Callable[[str], object] = lambda what: None,
) -> list[dict[str, Any]]:
    """Run every case on two ranks and predict it: time, bytes, memory."""
    rows = []
    for case in cases:
        measured = run_ranks(RANKS, _measure_case, case, timeout_seconds=600.0)
        rows.append(_row(case, cluster, measured))
        advance(case.name)
    return rows


def _row(case: Case, cluster: Cluster, measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    call = case.call()
    traits = cpu_traits(call.sizes)
    seconds = {}
    for name in ("forward", "backward"):
        runs = [
            max(end for _, end in spans) - min(start for start, _ in spans)
            for spans in zip(*(figures[name] for figures in measured), strict=True)
        ]
        seconds[name] = statistics.median(runs)
    predicted = {
        name: simulate_timeline(call, cluster, traits, backward=name == "backward").seconds
        for name in ("forward", "backward")
    }
    step, predicted_step = sum(seconds.values()), sum(predicted.values())
    sent = [call.sizes.sent_bytes(call.program(rank).sent()).total_bytes for rank in range(RANKS)]
    memory = [predict_memory(call, rank, traits, backward=True).total for rank in range(RANKS)]
    counted = [figures["memory"] for figures in measured]
    return {
        "case": case.name,
        "parameters": {**asdict(case), "heads": HEADS, "head_dim": HEAD_DIM, "ranks": RANKS},
        "measured_seconds": {**seconds, "step": step},
        "predicted_seconds": {**predicted, "step": predicted_step},
        "step_error": predicted_step / step - 1,
        "sent_bytes": [figures["sent"] for figures in measured],
        "predicted_sent_bytes": sent,
        "counted_memory_bytes": max(counted),
        "predicted_memory_bytes": max(memory),
        "memory_error": max(memory) / max(counted) - 1,
    }


def cpu_traits(sizes: Sizes) -> KernelTraits:
    """Of the kernel that computes on this machine's CPU."""
    return traits_of(select_kernel("auto", sizes.problem("cpu")))


def _rates(dtype: str) -> Rates:
    """Seconds of kernel calls, fitted as a constant and a part per FLOP, in either pass."""
    per_rank = run_ranks(RANKS, _measure_kernels, dtype, timeout_seconds=600.0)
    sizes = Sizes(HEADS, HEADS, HEAD_DIM, HEAD_DIM, dtype)
    pairs = [cpu_traits(sizes).computed_pairs(tile) for tile in _tiles()]
    plain = len(pairs) - len(BANDS) - len(SHORT_CALLS)
    figures = []
    for number, backward in enumerate((False, True)):
        times = [statistics.mean(some) for some in zip(*(f[number] for f in per_rank), strict=True)]
        flops = [sizes.flops(n, backward=backward) for n in pairs]
        constant, per_flop = _line(flops[:plain], times[:plain])
        constant = max(constant, 0.0)
        short = sum(times[plain:]) / sum(constant + n * per_flop for n in flops[plain:])
        figures.append((1 / per_flop, constant, short))
    (forward, forward_call, forward_short), (back, back_call, back_short) = figures
    return Rates(forward, back, forward_call, back_call, forward_short, back_short)


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """(a, b) of y = a + b x, with the least relative errors; b is above 0."""
    weights = 1 / torch.tensor(y, dtype=torch.float64)
    columns = torch.stack([torch.ones(len(x)), torch.tensor(x, dtype=torch.float64)], dim=1)
    solution = torch.linalg.lstsq(
        columns.double() * weights[:, None], torch.ones(len(x), 1, dtype=torch.float64)
    ).solution
    return float(solution[0]), max(float(solution[1]), 1e-15)


def _tiles() -> list[Tile]:
    """Full and causal calls of several sizes, then short ones."""
    full = [Tile(0, nq, 0, nk) for nq, nk in CALLS]
    causal = [trim(Tile(0, nq, 0, nq, hi=0)) for nq, nk in CALLS if nq == nk]
    short = [Tile(0, nq, 0, nk) for nq, nk in SHORT_CALLS]
    bands = [trim(Tile(0, nq, 0, nk, -left, nk - nq)) for nq, nk, left in BANDS]
    return [*full, *(tile for tile in (*causal, *short, *bands) if tile)]


def _median_seconds(run: Callable[[], object]) -> float:
    """Of repeated runs that both ranks begin together."""
    run()
    samples = []
    for _ in range(REPEATS):
        dist.barrier()
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def _measure_kernels(rank: Rank, dtype: str) -> tuple[list[float], list[float]]:
    """On one rank: seconds of every tile, forward and backward."""
    sizes = Sizes(HEADS, HEADS, HEAD_DIM, HEAD_DIM, dtype)
    kernel = select_kernel("auto", sizes.problem("cpu"))
    forward, backward = [], []
    for tile in _tiles():
        shapes = [(1, n, HEADS, HEAD_DIM) for n in (tile.q1, tile.k1, tile.k1, tile.q1)]
        q, k, v, dout = (torch.randn(shape, dtype=sizes.torch_dtype) for shape in shapes)
        scores = TileScores(0.125, tile.window())
        tensors = BackwardTensors(dout, None, q, k, v, *kernel.forward(q, k, v, scores))
        forward.append(_median_seconds(partial(kernel.forward, q, k, v, scores)))
        backward.append(_median_seconds(partial(kernel.backward, tensors, scores)))
    return forward, backward


def _measure_moving(rank: Rank) -> dict[str, Any]:
    """On one rank: bytes merged per second, seconds of messages, and how well both overlap."""
    touched, merging = [], []
    for rows in MERGED_ROWS:
        out, block = (torch.randn(1, rows, HEADS, HEAD_DIM) for _ in range(2))
        lse, block_lse = (torch.randn(1, HEADS, rows) for _ in range(2))
        tensors = out, lse, block, block_lse
        touched.append(3 * out.nbytes + 8 * lse.nbytes)
        merging.append(_median_seconds(lambda some=tensors: merge_(*some)))  # type: ignore[misc]
    merge_seconds, per_merged_byte = _line(touched, merging)
    place = find_place(group_string(rank.group))
    transport = Transport(place, None, "calibration", 0)
    peer = 1 - rank.rank

    def move(x: Tensor, y: Tensor) -> Any:
        return transport.post("forward_kv", [Message(peer, x)], [Message(peer, y)])

    messages = []
    for size in MESSAGE_BYTES:
        x, y = torch.zeros(size // 4), torch.zeros(size // 4)
        messages.append(_median_seconds(lambda x=x, y=y: move(x, y).wait()))  # type: ignore[misc]
    return {
        "merge_bytes_per_second": 1 / per_merged_byte,
        "merge_seconds": max(merge_seconds, 0.0),
        "messages": messages,
        "overlap": _overlap(move, messages[-1]),
    }


def _overlap(move: Callable[[Tensor, Tensor], Any], moving: float) -> float:
    """The part of a large transfer that goes on beside computing that takes longer."""
    x, y = (torch.zeros(MESSAGE_BYTES[-1] // 4) for _ in range(2))
    a = torch.randn(384, 384)
    one = _median_seconds(lambda: a @ a)
    times = max(1, round(2 * moving / one))

    def compute() -> None:
        for _ in range(times):
            a @ a

    def both() -> None:
        transfer = move(x, y)
        compute()
        transfer.wait()

    alone = _median_seconds(compute)
    hidden = alone + moving - _median_seconds(both)
    return min(1.0, max(0.0, hidden / min(alone, moving)))


def _measure_case(rank: Rank, case: Case) -> dict[str, Any]:
    """On one rank: when each pass began and ended in every run, bytes sent, tensor bytes."""
    shape = case.tokens // RANKS, HEAD_DIM
    dtype = case.call().sizes.torch_dtype
    window = (case.mask.left if case.mask.left < case.tokens else -1, -1)
    options: dict[str, Any] = {
        "causal": case.mask.right == 0,
        "window_size": window,
        "process_group": rank.group,
        "exchange": case.exchange,
    }
    function: Callable[..., Any] = wrap_ring_attn_func
    if case.layout == "zigzag":
        function, options["layout"] = wrap_zigzag_attn_func, "zigzag"
    spans: dict[str, list[tuple[float, float]]] = {"forward": [], "backward": []}

    def run() -> None:
        heads = HEADS, case.kv_heads, case.kv_heads, HEADS
        q, k, v, dout = (torch.randn(1, shape[0], h, shape[1], dtype=dtype) for h in heads)
        for x in (q, k, v):
            x.requires_grad_()
        dist.barrier()
        start = time.monotonic()
        out = function(q, k, v, **options)
        spans["forward"].append((start, time.monotonic()))
        dist.barrier()
        start = time.monotonic()
        out.backward(dout)
        spans["backward"].append((start, time.monotonic()))

    run()
    before = traffic(rank.group)
    run()
    sent = (traffic(rank.group) - before).total_bytes
    spans["forward"].clear()
    spans["backward"].clear()
    for _ in range(REPEATS):
        run()
    times = {name: list(some) for name, some in spans.items()}
    return {**times, "sent": sent, "memory": count_tensor_bytes(run).peak}


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
