"""Draws docs/images/dilated.png: dilated attention as a matrix, from the tiles of all ranks.

    python docs/draw_dilated.py

A pair that two branches show is outlined: it counts twice.
"""

from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from draw_tiles import COLOURS, RANKS, TOKENS, shade
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from nnscaler_ring.core.dilated import DilatedPlan, SpanningRows
from nnscaler_ring.core.plan.dilation import Branch, HeadOffsets, SpanningSegments
from nnscaler_ring.core.plan.schedule import CAUSAL, Mask, Schedule

SHARDS = (TOKENS // RANKS,) * RANKS
SHORT, MIDDLE, LONG = Branch(6, 1), Branch(16, 2), Branch(48, 4)
PANELS = (
    ("head 0: segments of 6, every token", [SHORT], 0),
    ("head 0: segments of 16, every 2nd", [MIDDLE], 0),
    ("head 1: segments of 16, every 2nd", [MIDDLE], 1),
    ("head 3: segments of 48, every 4th", [LONG], 3),
    ("head 0: all three", [SHORT, MIDDLE, LONG], 0),
    ("head 3: all three", [SHORT, MIDDLE, LONG], 3),
)

Pair = tuple[int, int]
"""Query token and key token."""


def pairs_of(
    rank: int, branches: list[Branch], head: int, mask: Mask = CAUSAL
) -> Counter[tuple[Pair, int]]:
    """How often a rank computes each (pair, step at which the key is there) for one head."""
    offsets = HeadOffsets("mod", head, head + 1)
    plan = DilatedPlan.of(branches, offsets, 1, SHARDS, mask, "direct", rank)
    found: Counter[tuple[Pair, int]] = Counter()

    def paint(tiles, q: torch.Tensor, k: torch.Tensor, step: int) -> None:
        for tile in tiles:
            for i in range(tile.q0, tile.q1):
                for j in range(tile.k0, tile.k1):
                    if tile.lo <= j - i <= tile.hi:
                        found[(int(q[i]), int(k[j])), step] += 1

    for part in (part for parts in plan.alone for part in parts):
        (compute,) = part.program.forward
        for segment in part.queries.take(_tokens(rank)):
            paint(compute.tiles, segment[:, 0], segment[:, 0], 0)
    for part in plan.shared:
        group = part.queries.group
        rows = SpanningSegments(SHARDS, tuple(branches), group.offsets)
        held = [
            SpanningRows(tuple(rows.strips(r)), group).take(_tokens(r))[0, :, 0]
            for r in range(RANKS)
        ]
        schedule = Schedule(rows, rows, mask)
        for step in range(RANKS):
            source = (rank - step) % RANKS
            paint(schedule.tiles(rank, (source,)), held[rank], held[source], step)
    return found


def _tokens(rank: int) -> torch.Tensor:
    """[batch 1, tokens, heads 1]: the numbers of a rank's tokens."""
    return torch.arange(TOKENS).split(list(SHARDS))[rank].view(1, -1, 1)


def _draw(axes: Axes, title: str, branches: list[Branch], head: int) -> None:
    image = [[(1.0, 1.0, 1.0)] * TOKENS for _ in range(TOKENS)]
    times: Counter[Pair] = Counter()
    for rank in range(RANKS):
        for ((query, key), step), count in pairs_of(rank, branches, head).items():
            image[query][key] = shade(COLOURS[rank], step)
            times[query, key] += count
    axes.imshow(image, interpolation="nearest")
    for (query, key), count in times.items():
        if count > 1:
            corner = (key - 0.5, query - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=0.6))
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("key position")
    axes.set_ylabel("query position")
    axes.label_outer()
    axes.tick_params(labelsize=7)


def main() -> None:
    """Draw all panels into docs/images/dilated.png."""
    figure, grid = plt.subplots(2, 3, figsize=(11, 8.2), layout="constrained", sharex=True)
    for axes, panel in zip(grid.flat, PANELS, strict=True):
        _draw(axes, *panel)
    ranks = [Patch(color=colour, label=f"rank {n}") for n, colour in enumerate(COLOURS)]
    twice = Patch(facecolor="white", edgecolor="black", label="counts more than once")
    figure.legend(handles=[*ranks, twice], loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(Path(__file__).parent / "images" / "dilated.png", dpi=110)


if __name__ == "__main__":
    main()
