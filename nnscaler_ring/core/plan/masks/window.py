"""Causal masks, full ones, and windows: a bound on the distance to either side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from nnscaler_ring.core.plan.masks.contract import Band, Mask, integer
from nnscaler_ring.core.plan.span import Span
from nnscaler_ring.core.plan.tile import UNBOUNDED


@dataclass(frozen=True, repr=False)
class Window(Mask):
    """Query position p sees key positions `[p - left, p + right]`; what is left out is unbounded.

    `Window(right=0)` is the causal mask, `CAUSAL`; `Window()` is `FULL`.
    """

    examples: ClassVar[tuple[str, ...]] = (
        "Window()",
        "Window(right=0)",
        "Window(left=10, right=0)",
        "Window(left=6, right=6)",
        "Window(left=0, right=3)",
        "Window(left=2)",
    )

    left: int = UNBOUNDED
    right: int = UNBOUNDED

    def __post_init__(self) -> None:
        for side in ("left", "right"):
            if (distance := getattr(self, side)) == -1:
                raise ValueError(f"{side} of Window must be >= 0, got -1; leave it out: unbounded.")
            distance = integer(f"{side} of Window", distance)
            object.__setattr__(self, side, min(distance, UNBOUNDED))

    @classmethod
    def from_window(cls, causal: bool, window_size: tuple[int, int]) -> Window:
        """flash-attn's arguments: -1 is unbounded; `causal` caps the right side at 0."""
        left, right = (UNBOUNDED if side == -1 else side for side in window_size)
        return cls(left, min(right, 0) if causal else right)

    def bands(self, q: Span, k: Span) -> Iterable[Band]:
        return (Band(lo=-self.left, hi=self.right),)

    def sees(self, query: Any, key: Any, document: int = 0) -> Any:
        return (key >= query - self.left) & (key <= query + self.right)


CAUSAL = Window(right=0)
FULL = Window()
