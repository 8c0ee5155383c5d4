"""One simulation from start to end: run, check, measure memory, predict time; a record of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from nnscaler_ring import __version__
from nnscaler_ring.core.device import device_name
from nnscaler_ring.core.plan.masks import Window
from nnscaler_ring.core.plan.tile import UNBOUNDED
from nnscaler_ring.simulator.call import SimulatedCall, sides_of
from nnscaler_ring.simulator.cluster import Cluster
from nnscaler_ring.simulator.inputs import GeneratedInputs
from nnscaler_ring.simulator.memory import KernelTraits, predict_memory, traits_of
from nnscaler_ring.simulator.plots import plot_mask, plot_memory, plot_timeline
from nnscaler_ring.simulator.profiler import RingAttentionMemoryProfiler
from nnscaler_ring.simulator.sampled_rows import exact_rows
from nnscaler_ring.simulator.simulator import RingAttentionSimulator
from nnscaler_ring.simulator.timeline import Timeline, simulate_timeline

MASK_TOKENS = 96
"""Of the picture of the mask, which is drawn for a shorter sequence."""

SAMPLED_ROWS = 16
LIMITS = {"float64": 1e-10, "float32": 2e-6, "bfloat16": 2e-2, "float16": 3e-3}
"""Largest error of sampled rows: relative L2, for float64 absolute."""


@dataclass(frozen=True)
class Simulation:
    """What to simulate.

    Args:
        call: the attention and its ranks.
        cluster: whose timeline is predicted.
        backward: with the backward pass.
        share: one rank to run, or None for all of them.
        device: where to compute.
        ring_sizes: for which memory is measured.
        seed: of the generated inputs.
    """

    call: SimulatedCall
    cluster: Cluster
    backward: bool
    share: int | None
    device: str
    ring_sizes: tuple[int, ...]
    seed: int

    def steps(self) -> int:
        """How often `run_simulation` reports progress."""
        runs = 1 if self.share is not None else self.call.ranks * (2 if self.backward else 1)
        return runs + len(self.ring_sizes)


def run_simulation(
    simulation: Simulation, advance: Callable[[str], object] = lambda what: None
) -> dict[str, Any]:
    """Run it; everything that was found, as plain values. `advance(what)` after each part."""
    call = simulation.call
    inputs = GeneratedInputs(call.sizes, simulation.seed, simulation.device)
    simulator = RingAttentionSimulator(call, inputs, simulation.device)
    start = time.monotonic()
    ran = _run(simulation, simulator, advance)
    seconds = time.monotonic() - start
    traits = _traits(simulation.cluster, simulator)
    return {
        "call": _call_json(call),
        "simulated": f"rank {simulation.share} of {call.ranks}"
        if simulation.share is not None
        else f"all {call.ranks} ranks, one after another",
        "backward": simulation.backward,
        "seconds_here": seconds,
        **ran,
        "memory": _memory(simulation, inputs, advance),
        "timeline": {
            name: _timeline_json(timeline)
            for name, timeline in timelines(simulation, traits).items()
        },
        "cluster": simulation.cluster.to_json(),
        "device": device_name(torch.device(simulation.device).type),
        "versions": {"torch": torch.__version__, "nnscaler_ring": __version__},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def timelines(simulation: Simulation, traits: KernelTraits) -> dict[str, Timeline]:
    """The passes' timelines on the cluster."""
    passes = {"forward": False} | ({"backward": True} if simulation.backward else {})
    return {
        name: simulate_timeline(simulation.call, simulation.cluster, traits, backward=backward)
        for name, backward in passes.items()
    }


def _traits(cluster: Cluster, simulator: RingAttentionSimulator) -> KernelTraits:
    same = torch.device(simulator.device).type == cluster.device_type
    return traits_of(simulator.kernel) if same else KernelTraits()


def _run(
    simulation: Simulation, simulator: RingAttentionSimulator, advance: Callable[[str], object]
) -> dict[str, Any]:
    """Compute, compare sampled rows with float64, compare the bytes with the plan's."""
    call, rank = simulation.call, simulation.share
    layout = call.schedule.q_layout
    if rank is None:
        results = simulator.all_ranks(
            backward=simulation.backward, on_share=lambda r: advance(f"rank {r}")
        )
        out, sent, ranks = results.out, results.sent, list(range(call.ranks))
        tokens = torch.arange(call.tokens)
    else:
        share = simulator.rank_share(rank, backward=simulation.backward)
        advance(f"rank {rank}")
        out, sent, ranks = share.out, [share.sent], [rank]
        tokens = call.tokens_of(layout, rank)
    rows = torch.linspace(0, len(tokens) - 1, min(SAMPLED_ROWS, len(tokens))).long().unique()
    errors = [_error(simulator, out, int(row), int(tokens[row])) for row in rows]
    predicted = [call.sizes.sent_bytes(call.program(r).sent()) for r in ranks]
    return {
        "sampled_rows": len(rows),
        "largest_error": max(errors),
        "error_limit": LIMITS[call.sizes.dtype],
        "is_exact": max(errors) <= LIMITS[call.sizes.dtype],
        "kernel": simulator.kernel.name,
        "sent_bytes": [traffic.total_bytes for traffic in sent],
        "predicted_sent_bytes": [
            p.total_bytes if simulation.backward else p.forward_kv_bytes for p in predicted
        ],
        "messages": [traffic.messages for traffic in sent],
    }


def _error(simulator: RingAttentionSimulator, out: torch.Tensor, row: int, token: int) -> float:
    """Of one result row, against float64 over all keys that it sees."""
    call = simulator.call
    left, right = (None if x == UNBOUNDED else x for x in _sides(call))
    first = 0 if left is None else max(0, token - left)
    last = call.tokens if right is None else min(call.tokens, token + right + 1)
    exact, _ = exact_rows(
        simulator.inputs, torch.tensor([token]), call.scale, first, last, left=left, right=right
    )
    difference = (out[:, row : row + 1].double() - exact).cpu()
    if call.sizes.dtype == "float64":
        return float(difference.abs().max())
    return float(difference.norm() / exact.norm())


def _memory(
    simulation: Simulation, inputs: GeneratedInputs, advance: Callable[[str], object]
) -> list[dict[str, Any]]:
    """For every ring size the last rank's measured and predicted peak."""
    found = []
    for ranks in simulation.ring_sizes:
        call = replace(simulation.call, ranks=ranks, shard_lens=None)
        simulator = RingAttentionSimulator(call, inputs, simulation.device)
        profiler = RingAttentionMemoryProfiler(simulator, ranks - 1, backward=simulation.backward)
        profile = profiler.profile()
        found.append({"ring_size": ranks, **asdict(profile), "measured": profile.total})
        advance(f"memory of ring size {ranks}")
    return found


def write_pictures(simulation: Simulation, record: Mapping[str, Any], folder: Path) -> list[Path]:
    """memory.png, timeline.png and mask.png."""
    call = simulation.call
    what = f"{call.tokens:,} tokens, {call.exchange}"
    sizes = sorted({*simulation.ring_sizes, *(2**n for n in range(9) if 2**n <= call.tokens)})
    inputs = GeneratedInputs(call.sizes, simulation.seed, simulation.device)
    simulator = RingAttentionSimulator(call, inputs, simulation.device)
    predicted = {}
    for ranks in sizes:
        some = replace(call, ranks=ranks, shard_lens=None)
        memory = predict_memory(
            some, ranks - 1, traits_of(simulator.kernel), backward=simulation.backward
        )
        predicted[ranks] = memory.total
    measured = {entry["ring_size"]: entry["measured"] for entry in record["memory"]}
    paths = [
        plot_memory(
            folder / "memory.png",
            {call.exchange: predicted},
            {call.exchange: measured},
            f"memory per rank: {what}",
        )
    ]
    passes = timelines(simulation, _traits(simulation.cluster, simulator))
    paths.append(
        plot_timeline(
            folder / "timeline.png", passes, f"{what}, predicted for {simulation.cluster.name}"
        )
    )
    small = small_copy(call)
    title = f"who computes what, darker = later\n(the same over {small.tokens} tokens)"
    return [*paths, plot_mask(folder / "mask.png", small, title)]


def small_copy(call: SimulatedCall, tokens: int = MASK_TOKENS) -> SimulatedCall:
    """The same call over few tokens, with windows and documents shrunk alike."""
    if call.tokens <= tokens:
        return call

    def shrunk(n: int) -> int:
        return n if n in (0, UNBOUNDED) else max(1, n * tokens // call.tokens)

    left, right = map(shrunk, _sides(call))
    mask = Window(left, right)
    cu = call.cu_seqlens and tuple(n * tokens // call.tokens for n in call.cu_seqlens)
    return replace(call, tokens=tokens, mask=mask, cu_seqlens=cu, shard_lens=None)


def _sides(call: SimulatedCall) -> tuple[int, int]:
    """How far a query sees to either side."""
    if not isinstance(call.mask, Window):
        raise ValueError(
            f"mask of a recorded simulation must be a Window, got {call.mask}; "
            "RingAttentionSimulator computes every mask."
        )
    return call.mask.left, call.mask.right


def _call_json(call: SimulatedCall) -> dict[str, Any]:
    fields = {
        name: getattr(call, name)
        for name in ("tokens", "ranks", "q_layout", "k_layout", "exchange", "cu_seqlens")
    }
    return {**fields, "mask": sides_of(call.mask), "sizes": asdict(call.sizes)}


def _timeline_json(timeline: Timeline) -> dict[str, Any]:
    return {
        "seconds": timeline.seconds,
        "overlap": timeline.overlap,
        "ranks": [
            {
                "rank": rank.rank,
                **{
                    f"{kind}_seconds": rank.seconds(kind)
                    for kind in ("compute", "transfer", "wait", "late")
                },
                "events": [event._asdict() for event in rank.events],
            }
            for rank in timeline.ranks
        ],
    }
