"""Draws the attention matrix of several layouts and masks, from the tiles.

    python docs/draw_tiles.py

docs/images/tiles.png has layouts, docs/images/masks.png an example of every kind of mask.

Every cell is painted by the rank that computes it, darker the later its keys arrive. Nothing is
drawn by hand: the picture is what `Schedule.tiles` returns.
"""

import textwrap
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from nnscaler_ring.core.plan.layout import (
    Contiguous,
    PackedDocuments,
    SequenceLayout,
    Striped,
    Zigzag,
)
from nnscaler_ring.core.plan.masks import CAUSAL, KINDS, Mask, Window, mask_of
from nnscaler_ring.core.plan.schedule import Schedule

TOKENS, RANKS = 48, 4
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728")
CONTIGUOUS = Contiguous((TOKENS // RANKS,) * RANKS)
CU_SEQLENS = (0, 9, 16, 33, 34, TOKENS)
PANELS: tuple[tuple[str, SequenceLayout, Mask], ...] = (
    ("contiguous, causal", CONTIGUOUS, CAUSAL),
    ("zigzag, causal", Zigzag(TOKENS, RANKS), CAUSAL),
    ("striped, causal", Striped(TOKENS, RANKS), CAUSAL),
    ("zigzag, causal, window 10", Zigzag(TOKENS, RANKS), Window(left=10, right=0)),
    ("contiguous, window 6 to both sides", CONTIGUOUS, Window(left=6, right=6)),
    ("packed documents, causal", PackedDocuments(CONTIGUOUS, CU_SEQLENS, CU_SEQLENS), CAUSAL),
)

MASKS: tuple[tuple[str, SequenceLayout, Mask], ...] = tuple(
    (kind.examples[0], CONTIGUOUS, mask_of(kind.examples[0]))
    for kind in KINDS.values()
    if kind is not Window
)
"""A new kind of mask is here by itself."""


def paint(layout: SequenceLayout, mask: Mask) -> tuple[list[list[tuple[float, ...]]], list[int]]:
    """An RGB image of the whole matrix in token order, and the visible pairs of every rank."""
    schedule = Schedule(layout, layout, mask)
    tokens = [list(chain(*layout.positions(rank))) for rank in range(RANKS)]
    image = [[(1.0, 1.0, 1.0)] * TOKENS for _ in range(TOKENS)]
    pairs = [0] * RANKS
    for rank in range(RANKS):
        for step in range(RANKS):
            source = (rank - step) % RANKS
            colour = shade(COLOURS[rank], step)
            for tile in schedule.tiles(rank, (source,)):
                pairs[rank] += tile.pairs()
                for i in range(tile.q0, tile.q1):
                    for j in range(tile.k0, tile.k1):
                        if tile.lo <= j - i <= tile.hi:
                            image[tokens[rank][i]][tokens[source][j]] = colour
    return image, pairs


def shade(colour: str, step: int) -> tuple[float, ...]:
    """Light when the keys are at hand, darker for each step that they arrive later."""
    strength = 0.35 + 0.65 * step / (RANKS - 1)
    return tuple(1 - strength * (1 - channel) for channel in to_rgb(colour))


def _draw(axes: Axes, title: str, layout: SequenceLayout, mask: Mask) -> None:
    image, pairs = paint(layout, mask)
    axes.imshow(image, interpolation="nearest")
    share = max(pairs) * RANKS / sum(pairs)
    lines = textwrap.wrap(title, 48)
    axes.set_title(
        "\n".join([*lines, f"busiest rank: {share:.2f} x the mean"]),
        fontsize=10 if len(lines) == 1 else 8,
    )
    axes.set_xlabel("key position")
    axes.set_ylabel("query position")
    axes.label_outer()
    axes.tick_params(labelsize=7)


def draw(name: str, panels: Sequence[tuple[str, SequenceLayout, Mask]]) -> None:
    """Draw panels, three in a row, into docs/images."""
    rows = -(-len(panels) // 3)
    size = (11, 0.4 + 4.1 * rows)
    figure, grid = plt.subplots(rows, 3, figsize=size, layout="constrained", sharex=True)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw(axes, *panel)
    ranks = [Patch(color=colour, label=f"rank {n}") for n, colour in enumerate(COLOURS)]
    figure.legend(handles=ranks, loc="outside lower center", ncols=RANKS, frameon=False)
    target = Path(__file__).parent / "images" / name
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    draw("tiles.png", PANELS)
    draw("masks.png", MASKS)
