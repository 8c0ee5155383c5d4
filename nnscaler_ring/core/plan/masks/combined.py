"""What two masks show together: `a & b` and `a | b`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from nnscaler_ring.core.plan.masks.contract import Band, Mask, disjoint, reach
from nnscaler_ring.core.plan.span import Span


@dataclass(frozen=True, repr=False)
class Both(Mask):
    """`first & second`: a query sees what both show it."""

    examples: ClassVar[tuple[str, ...]] = (
        "Chunks(size=20) & Window(left=9, right=0)",
        "Prefix(length=20) & Window(left=9, right=4)",
    )

    first: Mask
    second: Mask

    def bands(self, q: Span, k: Span) -> Iterable[Band]:
        box = reach(q, k)
        others = [band.meet(box) for band in self.second.bands(q, k)]
        for mine in self.first.bands(q, k):
            for other in others:
                band = mine.meet(other)
                if not band.is_empty():
                    yield band

    def sees(self, query: Any, key: Any, document: int = 0) -> Any:
        return self.first.sees(query, key, document) & self.second.sees(query, key, document)

    def check(self, lengths: Sequence[tuple[int, int]]) -> None:
        self.first.check(lengths)
        self.second.check(lengths)

    def __repr__(self) -> str:
        return f"({self.first!r} & {self.second!r})"


@dataclass(frozen=True, repr=False)
class Either(Mask):
    """`first | second`: a query sees what one of them, or both, show it."""

    examples: ClassVar[tuple[str, ...]] = (
        "Window(left=9, right=0) | (Rectangles(rectangles=((0, 48, 0, 4),)) & Window(right=0))",
        "Chunks(size=7) | Chunks(size=10)",
    )

    first: Mask
    second: Mask

    def bands(self, q: Span, k: Span) -> Iterable[Band]:
        box = reach(q, k)
        met = (band.meet(box) for mask in (self.first, self.second) for band in mask.bands(q, k))
        return disjoint(band for band in met if not band.is_empty())

    def sees(self, query: Any, key: Any, document: int = 0) -> Any:
        return self.first.sees(query, key, document) | self.second.sees(query, key, document)

    def check(self, lengths: Sequence[tuple[int, int]]) -> None:
        self.first.check(lengths)
        self.second.check(lengths)

    def __repr__(self) -> str:
        return f"({self.first!r} | {self.second!r})"
