"""A list of rectangles with a band each: what MagiAttention calls slices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from nnscaler_ring.core.plan.masks.contract import Band, Mask, disjoint, integer, reach
from nnscaler_ring.core.plan.span import Span

BANDS = ("full", "causal", "inverse_causal", "bi_causal")
"""What a rectangle shows of itself: see `Rectangle`."""


class Rectangle(NamedTuple):
    """Query positions `[q_start, q_stop)` and key positions `[k_start, k_stop)`, and what of them.

    `band`: "full" shows all; "causal" what lies on or below the diagonal that ends in the last
    query and the last key; "inverse_causal" what lies on or above the diagonal that begins in the
    first query and the first key; "bi_causal" what both show.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    band: str = "full"

    def shown(self) -> Band:
        """Its pairs."""
        q0, q1, k0, k1, name = self
        box = Band(q0, q1, k0, k1)
        if name in ("causal", "bi_causal"):
            box = box._replace(hi=k1 - q1)
        if name in ("inverse_causal", "bi_causal"):
            box = box._replace(lo=k0 - q0)
        return box


@dataclass(frozen=True, repr=False)
class Rectangles(Mask):
    """A query sees the keys that some rectangle shows it; what several show counts once.

    Args:
        rectangles: `(q_start, q_stop, k_start, k_stop)` or `(..., band)` each; see `Rectangle`.

    Source: MagiAttention (SandAI, 2025), whose `q_ranges`, `k_ranges` and `attn_type_map` say the
    same; there, rectangles must not overlap.
    """

    examples: ClassVar[tuple[str, ...]] = (
        "Rectangles(rectangles=((0, 20, 0, 20, 'causal'), (20, 48, 0, 9), "
        "(20, 48, 14, 48, 'bi_causal'), (9, 14, 30, 48, 'inverse_causal')))",
        "Rectangles(rectangles=((0, 30, 0, 30, 'causal'), (10, 40, 5, 20), (0, 0, 3, 9)))",
    )

    rectangles: Sequence[Sequence[Any]]

    shown: tuple[Band, ...] = field(init=False, compare=False)
    """Their pairs."""

    def checked(self) -> dict[str, Any]:
        rectangles = [_checked(some) for some in self.rectangles]
        return {
            "rectangles": tuple(map(tuple, rectangles)),
            "shown": tuple(rectangle.shown() for rectangle in rectangles),
        }

    def bands(self, q: Span, k: Span) -> Iterable[Band]:
        box = reach(q, k)
        met = (shown.meet(box) for shown in self.shown if shown.q0 < box.q1 and box.q0 < shown.q1)
        return disjoint(band for band in met if not band.is_empty())

    def sees(self, query: Any, key: Any, document: int = 0) -> Any:
        seen: Any = False
        for q0, q1, k0, k1, lo, hi in self.shown:
            inside = (query >= q0) & (query < q1) & (key >= k0) & (key < k1)
            seen = seen | (inside & (key - query >= lo) & (key - query <= hi))
        return seen

    def check(self, lengths: Sequence[tuple[int, int]]) -> None:
        for number, some in enumerate(self.rectangles):
            _, q_stop, _, k_stop, _ = some
            for _, keys in lengths:
                if q_stop > keys or k_stop > keys:
                    raise ValueError(
                        f"rectangles[{number}] must lie within the {keys} positions of the "
                        f"sequence, in a packed call of every document, got {tuple(some)}."
                    )


def _checked(some: Sequence[Any]) -> Rectangle:
    if not isinstance(some, Sequence) or isinstance(some, str) or len(some) not in (4, 5):
        raise TypeError(
            "rectangles must be (q_start, q_stop, k_start, k_stop) or (..., band) each, got "
            f"{some!r}."
        )
    names = Rectangle._fields[:4]
    edges = [integer(f"{name} of Rectangles", x) for name, x in zip(names, some[:4], strict=True)]
    rectangle = Rectangle(*edges, *some[4:])  # type: ignore[arg-type]
    if rectangle.q_start > rectangle.q_stop or rectangle.k_start > rectangle.k_stop:
        raise ValueError(f"a rectangle must not stop before it starts, got {some!r}.")
    if rectangle.band not in BANDS:
        raise ValueError(f"the band of a rectangle must be one of {BANDS}, got {rectangle.band!r}.")
    return rectangle
