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

    def checked(self) -> dict[str, Any]:
        for name in ("left", "right"):
            if getattr(self, name) == -1:
                raise ValueError(f"{name} of Window must be >= 0, got -1; leave it out: unbounded.")
        return {
            name: min(integer(f"{name} of Window", getattr(self, name)), UNBOUNDED)
            for name in ("left", "right")
        }

    @classmethod
    def from_window(cls, causal: bool, window_size: tuple[int, int]) -> Window:
        """Of flash-attn's arguments."""
        return cls(*sides_of(causal, window_size))

    def bands(self, q: Span, k: Span) -> Iterable[Band]:
        return (Band(lo=-self.left, hi=self.right),)

    def sees(self, query: Any, key: Any, document: int = 0) -> Any:
        return (key >= query - self.left) & (key <= query + self.right)

    def __repr__(self) -> str:
        return window_text(self.left, self.right)


def sides_of(causal: bool, window_size: tuple[int, int]) -> tuple[int, int]:
    """left and right of flash-attn's arguments: -1 is unbounded; `causal` caps the right at 0."""
    left, right = window_size
    return (
        UNBOUNDED if left == -1 else min(left, UNBOUNDED),
        0 if causal else UNBOUNDED if right == -1 else min(right, UNBOUNDED),
    )


def window_text(left: int, right: int) -> str:
    """The text of `Window(left, right)`, without making one."""
    sides = [] if left == UNBOUNDED else [f"left={left}"]
    if right != UNBOUNDED:
        sides.append(f"right={right}")
    return f"Window({', '.join(sides)})"


CAUSAL = Window(right=0)
FULL = Window()
