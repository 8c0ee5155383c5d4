"""What a mask is: a value that says which query sees which key, and turns itself into bands.

Note [Positions]
    Masks compare positions: where a token stands in the whole sequence, in a packed call in its
    document. In a document of lq queries and lk keys the last query stands where the last key
    stands, so query i is at position i + lk - lq, which may be negative; key j is at j.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, ClassVar, NamedTuple

from nnscaler_ring.core.plan.span import Span
from nnscaler_ring.core.plan.tile import UNBOUNDED


class Band(NamedTuple):
    """Query positions `[q0, q1)` and key positions `[k0, k1)`, visible where
    `lo <= key - query <= hi`.
    """

    q0: int = -UNBOUNDED
    q1: int = UNBOUNDED
    k0: int = -UNBOUNDED
    k1: int = UNBOUNDED
    lo: int = -UNBOUNDED
    hi: int = UNBOUNDED

    def meet(self, other: Band) -> Band:
        """The pairs that both hold; it may be empty."""
        return Band(
            max(self.q0, other.q0),
            min(self.q1, other.q1),
            max(self.k0, other.k0),
            min(self.k1, other.k1),
            max(self.lo, other.lo),
            min(self.hi, other.hi),
        )

    def is_empty(self) -> bool:
        """Whether it holds no pair."""
        q0, q1, k0, k1, lo, hi = self
        return q0 >= q1 or k0 >= k1 or max(lo, k0 - q1 + 1) > min(hi, k1 - 1 - q0)

    def without(self, other: Band) -> Iterator[Band]:
        """Disjoint bands that hold the pairs of this one that the other does not hold."""
        both = self.meet(other)
        if both.is_empty():
            yield self
            return
        beside = self._replace(q0=both.q0, q1=both.q1)
        inside = beside._replace(k0=both.k0, k1=both.k1)
        for part in (
            self._replace(q1=both.q0),
            self._replace(q0=both.q1),
            beside._replace(k1=both.k0),
            beside._replace(k0=both.k1),
            inside._replace(hi=min(self.hi, both.lo - 1)),
            inside._replace(lo=max(self.lo, both.hi + 1)),
        ):
            if not part.is_empty():
                yield part

    def moved(self, distance: int) -> Band:
        """The same pairs where every position counts `distance` more."""
        q0, q1, k0, k1 = (x if abs(x) == UNBOUNDED else x + distance for x in self[:4])
        return Band(q0, q1, k0, k1, self.lo, self.hi)


def reach(q: Span, k: Span) -> Band:
    """The box from the first to the last position of two spans."""
    (q0, q1), (k0, k1) = ((x.position, x.position + (x.length - 1) * x.stride + 1) for x in (q, k))
    return Band(q0, q1, k0, k1)


def disjoint(bands: Iterable[Band]) -> list[Band]:
    """Bands with the same pairs, each pair in one of them."""
    found: list[Band] = []
    for band in bands:
        rest = [band]
        for earlier in found:
            rest = [piece for some in rest for piece in some.without(earlier)]
        found += rest
    return found


@dataclass(frozen=True, repr=False)
class Mask:
    """Which query position sees which key position. A hashable value without tensors.

    A kind is a frozen dataclass of plain values with `bands` and `sees`, a name in `KINDS`. Masks
    combine: `a & b` shows what both show, `a | b` what one of them shows.
    """

    examples: ClassVar[tuple[str, ...]] = ()
    """Texts of a few masks of the kind, over 48 positions: for pictures, tests and error texts."""

    text: str = field(init=False, compare=False)
    """The Python expression that makes the mask, on one line; `mask_of` reads it."""

    def __post_init__(self) -> None:
        for name, value in self.checked().items():
            object.__setattr__(self, name, value)
        # Made once: torch.compile can read it, and a list of rectangles is long.
        object.__setattr__(self, "text", repr(self))

    def bands(self, q: Span, k: Span) -> Iterable[Band]:
        """Disjoint bands that hold the visible pairs of two spans of one document, and perhaps
        pairs of positions that neither span has.
        """
        raise NotImplementedError

    def sees(self, query: Any, key: Any, document: int = 0) -> Any:
        """The definition: whether a query position sees a key position.

        ints, or tensors of them, element by element.
        """
        raise NotImplementedError

    def checked(self) -> dict[str, Any]:
        """Fields as they are to be kept: plain ints, tuples and masks.

        Raises:
            TypeError, ValueError: a wrong value.
        """
        return {}

    def check(self, lengths: Sequence[tuple[int, int]]) -> None:
        """Whether the mask fits documents of so many (queries, keys).

        Raises:
            ValueError: it speaks of positions or documents that there are not.
        """

    def __repr__(self) -> str:
        values = (
            f"{name}={getattr(self, name)!r}"
            for name, its in self.__dataclass_fields__.items()
            if its.init and getattr(self, name) != its.default
        )
        return f"{type(self).__name__}({', '.join(values)})"

    def __and__(self, other: Mask) -> Mask:
        from nnscaler_ring.core.plan.masks.combined import Both

        return Both(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        from nnscaler_ring.core.plan.masks.combined import Either

        return Either(self, other) if isinstance(other, Mask) else NotImplemented


def integer(name: str, value: object, least: int = 0) -> int:
    """An argument of a mask as an int; numpy's integers are some.

    Raises:
        TypeError, ValueError: it is none, or below `least`.
    """
    try:
        number = index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}.") from None
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}.")
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}.")
    return number
