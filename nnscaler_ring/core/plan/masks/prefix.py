"""Prefix-LM: a prefix that sees all of itself, then causal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from nnscaler_ring.core.plan.masks.contract import Band, Mask, integer
from nnscaler_ring.core.plan.span import Span


@dataclass(frozen=True, repr=False)
class Prefix(Mask):
    """Positions below `length` see one another both ways; every other query sees no later key.

    Args:
        length: positions of the prefix; in a packed call of every document, or a sequence with the
            length of each document's own.

    Source: Raffel et al., "Exploring the limits of transfer learning", arXiv 1910.10683, 3.2.1.
    """

    examples: ClassVar[tuple[str, ...]] = ("Prefix(length=17)", "Prefix(length=0)")

    length: int | Sequence[int]

    def checked(self) -> dict[str, Any]:
        name, given = "length of Prefix", self.length
        if isinstance(given, Sequence):
            return {"length": tuple(integer(name, some) for some in given)}
        return {"length": integer(name, given)}

    def bands(self, q: Span, k: Span) -> Iterable[Band]:
        length = self._of(q.document)
        return Band(q1=length, k1=length), Band(q0=length, hi=0)

    def sees(self, query: Any, key: Any, document: int = 0) -> Any:
        length = self._of(document)
        return ((query < length) & (key < length)) | ((query >= length) & (key <= query))

    def check(self, lengths: Sequence[tuple[int, int]]) -> None:
        if not isinstance(self.length, int) and len(self.length) != len(lengths):
            raise ValueError(
                f"length of Prefix must have one length for each of the {len(lengths)} documents, "
                f"got {len(self.length)}; an int is the length for all of them."
            )

    def _of(self, document: int) -> int:
        return self.length if isinstance(self.length, int) else self.length[document]
