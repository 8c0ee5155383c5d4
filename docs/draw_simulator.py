"""Draws the pictures of docs/simulator.md from the simulator.

    python docs/draw_simulator.py        # a minute on two cores

Lines and times are predicted; points are counted while the real engine runs a rank's share.
"""

from dataclasses import replace
from pathlib import Path

from nnscaler_ring.core.plan.schedule import CAUSAL, Window
from nnscaler_ring.simulator import (
    GeneratedInputs,
    RingAttentionMemoryProfiler,
    RingAttentionSimulator,
    SimulatedCall,
    Sizes,
)
from nnscaler_ring.simulator.cluster import load_cluster
from nnscaler_ring.simulator.memory import KernelTraits, predict_memory, traits_of
from nnscaler_ring.simulator.plots import plot_mask, plot_memory, plot_timeline
from nnscaler_ring.simulator.timeline import simulate_timeline

IMAGES = Path(__file__).parent / "images"
EXCHANGES = ("direct", "ring", "all_gather")
MEASURED = (1, 2, 4, 8)
PREDICTED = (1, 2, 4, 8, 16, 32, 64)


def memory() -> None:
    """Forward and backward of the last rank: points counted, lines from the tiles."""
    sizes = Sizes(2, 2, 16, 16)
    tokens = 65536
    window = Window(left=2048, right=0)
    lines: dict[str, dict[int, int]] = {name: {} for name in EXCHANGES}
    points: dict[str, dict[int, int]] = {name: {} for name in EXCHANGES}
    for exchange in EXCHANGES:
        for ranks in PREDICTED:
            call = SimulatedCall(tokens, ranks, sizes, window, exchange=exchange)
            simulator = RingAttentionSimulator(call, GeneratedInputs(sizes))
            traits = traits_of(simulator.kernel)
            predicted = predict_memory(call, ranks - 1, traits, backward=True)
            lines[exchange][ranks] = predicted.total
            if ranks in MEASURED:
                profiler = RingAttentionMemoryProfiler(simulator, ranks - 1)
                points[exchange][ranks] = profiler.profile().total
    title = f"{tokens:,} tokens, window {window.left}, forward and backward"
    plot_memory(IMAGES / "simulator_memory.png", lines, points, title)


def timelines() -> None:
    """A causal layer on one H200 node, contiguous and zigzag."""
    cluster = load_cluster("h200")
    sizes = Sizes(32, 8, 128, 128, "bfloat16")
    for layout in ("contiguous", "zigzag"):
        call = SimulatedCall(131_072, 8, sizes, CAUSAL, layout)
        passes = {
            name: simulate_timeline(call, cluster, KernelTraits(), backward=name == "backward")
            for name in ("forward", "backward")
        }
        title = f"131,072 tokens, causal, {layout}, direct: predicted for {cluster.name}"
        plot_timeline(IMAGES / f"simulator_timeline_{layout}.png", passes, title)


def masks() -> None:
    """Who computes what when."""
    sizes = Sizes(1, 1, 1, 1)
    call = SimulatedCall(96, 4, sizes, CAUSAL, "zigzag")
    plot_mask(IMAGES / "simulator_mask.png", call, "zigzag, causal, 4 ranks")
    window = replace(call, mask=Window(left=30, right=0))
    plot_mask(IMAGES / "simulator_mask_window.png", window, "zigzag, window of 30, 4 ranks")


if __name__ == "__main__":
    memory()
    timelines()
    masks()
