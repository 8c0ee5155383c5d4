"""Chunked attention: causal within chunks of so many positions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from nnscaler_ring.core.plan.masks.contract import Band, Mask, integer, reach
from nnscaler_ring.core.plan.span import Span


@dataclass(frozen=True, repr=False)
class Chunks(Mask):
    """A query sees the keys of its own chunk of `size` positions up to itself.

    Chunk c is positions `[c * size, (c + 1) * size)`.

    Source: Llama 4's chunked attention (`attention_chunk_size` in its configuration).
    """

    examples: ClassVar[tuple[str, ...]] = ("Chunks(size=14)", "Chunks(size=1)", "Chunks(size=100)")

    size: int

    def checked(self) -> dict[str, Any]:
        return {"size": integer("size of Chunks", self.size, 1)}

    def bands(self, q: Span, k: Span) -> Iterable[Band]:
        q0, q1, k0, k1, _, _ = reach(q, k)
        for chunk in range(max(q0, k0) // self.size, (min(q1, k1) - 1) // self.size + 1):
            start, stop = chunk * self.size, (chunk + 1) * self.size
            yield Band(start, stop, start, stop, hi=0)

    def sees(self, query: Any, key: Any, document: int = 0) -> Any:
        return (key <= query) & (key // self.size == query // self.size)
