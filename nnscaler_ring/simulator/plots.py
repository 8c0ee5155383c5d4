"""The simulator's three pictures: memory against ring size, a timeline, who computes what when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnscaler_ring.simulator.call import SimulatedCall
from nnscaler_ring.simulator.timeline import Timeline

COLOURS = {"compute": "#4477aa", "transfer": "#ccbb44", "wait": "#ee6677", "late": "#bbbbbb"}
MIB = 2**20


def _new_figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def plot_memory(
    path: Path,
    predicted: Mapping[str, Mapping[int, int]],
    measured: Mapping[str, Mapping[int, int]],
    title: str,
) -> Path:
    """Bytes per rank against ring size: lines are predicted, points measured, one per exchange."""
    figure, axes = _new_figure(6.4, 4.2)
    for number, (name, line) in enumerate(predicted.items()):
        colour = f"C{number}"
        axes.plot(
            list(line), [n / MIB for n in line.values()], color=colour, label=f"{name}, predicted"
        )
        points = measured.get(name, {})
        axes.plot(
            list(points),
            [n / MIB for n in points.values()],
            "o",
            color=colour,
            label=f"{name}, measured",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("ring size (ranks)")
    axes.set_ylabel("peak of live tensors, MiB per rank")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _save(figure, path)


def plot_timeline(path: Path, passes: Mapping[str, Timeline], title: str) -> Path:
    """Every rank's computing and waiting, and its transfers below, one pass after another."""
    figure, axes = _new_figure(9.0, 1.2 + 0.45 * len(next(iter(passes.values())).ranks))
    offset = 0.0
    unit, name = _unit(sum(timeline.seconds for timeline in passes.values()))
    for label, timeline in passes.items():
        for rank in timeline.ranks:
            for event in rank.events:
                lower = event.kind == "transfer"
                axes.broken_barh(
                    [((offset + event.start) / unit, (event.end - event.start) / unit)],
                    (rank.rank + (0.18 if lower else -0.32), 0.16 if lower else 0.46),
                    facecolors=COLOURS[event.kind],
                    edgecolors="white",
                    linewidth=0.3,
                )
        axes.axvline(offset / unit, color="grey", linewidth=0.6)
        axes.annotate(label, (offset / unit, -0.6), fontsize=8)
        offset += timeline.seconds
    for kind, colour in COLOURS.items():
        axes.plot([], [], color=colour, linewidth=6, label=kind)
    axes.set_ylim(len(timeline.ranks) - 0.4, -0.8)
    axes.set_yticks(range(len(timeline.ranks)), [f"rank {r.rank}" for r in timeline.ranks])
    axes.set_xlabel(name)
    axes.set_title(title, fontsize=10)
    figure.legend(fontsize=8, loc="outside lower center", ncols=len(COLOURS))
    return _save(figure, path)


def _unit(seconds: float) -> tuple[float, str]:
    for unit, name in ((1.0, "seconds"), (1e-3, "milliseconds")):
        if seconds >= unit:
            return unit, name
    return 1e-6, "microseconds"


def plot_mask(path: Path, call: SimulatedCall, title: str) -> Path:
    """The attention matrix in token order: a colour per rank, darker the later its keys arrive.

    O(tokens^2) cells: for calls of at most a few hundred tokens; `small_copy` makes one.
    """
    import numpy
    from matplotlib import colormaps

    schedule = call.schedule
    image = numpy.ones((call.tokens, call.tokens, 3))
    colours = colormaps["tab10"]
    for rank in range(call.ranks):
        rows = _tokens(call, schedule.q_layout, rank)
        for step in range(call.ranks):
            source = (rank - step) % call.ranks
            keys = _tokens(call, schedule.k_layout, source)
            strength = 0.35 + 0.65 * step / max(1, call.ranks - 1)
            colour = [1 - strength * (1 - c) for c in colours(rank % 10)[:3]]
            for tile in schedule.tiles(rank, (source,)):
                for i in range(tile.q0, tile.q1):
                    seen = range(max(tile.k0, i + tile.lo), min(tile.k1, i + tile.hi + 1))
                    image[rows[i], [keys[j] for j in seen]] = colour
    figure, axes = _new_figure(4.6, 4.8)
    axes.imshow(image, interpolation="nearest")
    axes.set_xlabel("key position")
    axes.set_ylabel("query position")
    axes.set_title(title, fontsize=10)
    return _save(figure, path)


def _tokens(call: SimulatedCall, layout: Any, rank: int) -> Sequence[int]:
    tokens: list[int] = call.tokens_of(layout, rank).tolist()
    return tokens
