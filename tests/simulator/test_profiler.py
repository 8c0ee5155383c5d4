"""Counted memory, component by component, and the prediction beside it."""

import itertools

import pytest
import torch

from nnscaler_ring.core.plan.schedule import CAUSAL, FULL, Mask, Window
from nnscaler_ring.simulator import (
    GeneratedInputs,
    RingAttentionMemoryProfiler,
    RingAttentionSimulator,
    SimulatedCall,
    Sizes,
)
from nnscaler_ring.simulator.live_bytes import LiveBytes

MIB = 2**20
WITHIN = 0.05  # of the counted peak, the promise of the planner


def profiler(
    ranks: int, rank: int, exchange: str = "direct", **changes: object
) -> RingAttentionMemoryProfiler:
    dtype = str(changes.pop("dtype", "float32"))
    backward = bool(changes.pop("backward", True))
    kv_heads = int(str(changes.pop("kv_heads", 4)))
    sizes = Sizes(4, kv_heads, 16, 16, dtype)
    options = {"mask": CAUSAL, "q_layout": "zigzag"} | changes
    call = SimulatedCall(
        tokens=4096 * ranks,
        ranks=ranks,
        sizes=sizes,
        exchange=exchange,
        **options,  # type: ignore[arg-type]
    )
    simulator = RingAttentionSimulator(call, GeneratedInputs(sizes))
    return RingAttentionMemoryProfiler(simulator, rank, backward=backward)


def predictions():
    """Everything with everything; `make test` has the forward passes and the usual exchange."""
    for exchange, dtype, backward in itertools.product(
        ("direct", "ring", "all_gather"), ("bfloat16", "float32"), (False, True)
    ):
        quick = dtype == "bfloat16" and (exchange == "direct" or not backward)
        yield pytest.param(exchange, dtype, backward, marks=() if quick else pytest.mark.full)


@pytest.mark.parametrize(("exchange", "dtype", "backward"), list(predictions()))
def test_prediction_is_within_5_percent(exchange: str, dtype: str, backward: bool) -> None:
    for ranks, layout, kv_heads in itertools.product((1, 3), ("contiguous", "zigzag"), (4, 1)):
        measured = profiler(
            ranks,
            ranks - 1,
            exchange,
            dtype=dtype,
            backward=backward,
            q_layout=layout,
            mask=FULL if kv_heads == 1 else CAUSAL,
            kv_heads=kv_heads,
        ).profile()
        what = (ranks, layout, kv_heads, measured)
        assert abs(measured.predicted - measured.total) <= WITHIN * measured.total, what


def test_prediction_of_a_window() -> None:
    window = Window(300, 0)
    for ranks in (1, 3):
        profiler(ranks, 0, mask=window).profile()  # makes the masks that the kernel keeps
        measured = profiler(ranks, 0, mask=window).profile()
        assert abs(measured.predicted - measured.total) <= WITHIN * measured.total, measured


def test_reported_components() -> None:
    usage = profiler(2, 1).profile_memory_usage()
    assert usage["q_memory"] == 4096 * 4 * 16 * 4
    assert usage["kv_memory"] == 2 * 4096 * 4 * 16 * 4
    assert usage["kv_chunk_memory"] == usage["kv_memory"] // 2  # two messages a step
    assert usage["temp_scores_memory"] >= 0
    parts = sum(n for name, n in usage.items() if not name.endswith("total_memory"))
    assert usage["q_memory"] < usage["total_memory"] <= parts


def test_score_matrices_are_seen() -> None:
    """The reference kernel has them: [heads, rows, keys] in float32."""
    sizes = Sizes(2, 2, 8, 8)
    call = SimulatedCall(512, 2, sizes, FULL, kernel="reference")
    simulator = RingAttentionSimulator(call, GeneratedInputs(sizes))
    usage = RingAttentionMemoryProfiler(simulator, backward=False).profile_memory_usage()
    assert usage["temp_scores_memory"] >= 2 * 256 * 256 * 4


@pytest.mark.parametrize(("mask", "backward"), [(CAUSAL, False), (Window(700, 0), True)], ids=str)
def test_memory_per_rank_falls_as_one_over_ranks(mask: Mask, backward: bool) -> None:
    """Problem 3 of docs/origins.md's plan, and its first criterion: O(n / ring_size)."""
    peaks = []
    for ranks in (1, 2, 4, 8):
        sizes = Sizes(1, 1, 8, 8)
        call = SimulatedCall(65536, ranks, sizes, mask, "zigzag")
        simulator = RingAttentionSimulator(call, GeneratedInputs(sizes))
        profiler = RingAttentionMemoryProfiler(simulator, ranks - 1, backward=backward)
        profile = profiler.profile()
        # Without the masks of bands, which the kernel makes once and keeps: a few MB at most.
        peaks.append(profile.total - profile.at_peak.get("temp_scores", 0))
    for more, fewer in itertools.pairwise(peaks[1:]):
        assert fewer < 0.6 * more, peaks
    assert peaks[-1] < peaks[0] / 3, peaks  # one device holds no messages


def test_all_gather_memory_does_not_fall() -> None:
    direct, gathered = (
        profiler(4, 3, exchange).profile().total for exchange in ("direct", "all_gather")
    )
    assert gathered > 1.8 * direct


def test_live_bytes_follow_storages() -> None:
    with LiveBytes() as meter:
        with meter.making("first"):
            x = torch.zeros(1000)
        view = x[10:]
        with meter.making("second"):
            y = x + 1
        assert meter.live == {"first": 4000, "second": 4000}
        del x
        assert meter.live["first"] == 4000, "a view keeps its storage"
        meter.move(y, "third")
        del view, y
        with meter.paused():
            torch.zeros(5000)
    assert meter.live.total() == 0
    assert meter.peak.total() == 8000
    assert meter.highest == {"first": 4000, "second": 4000, "third": 4000}
