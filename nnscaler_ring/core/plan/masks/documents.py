"""Documents of any mask, one after another in one sequence."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from nnscaler_ring.core.plan.masks.contract import Band, Mask, integer, reach
from nnscaler_ring.core.plan.masks.window import CAUSAL
from nnscaler_ring.core.plan.span import Span


@dataclass(frozen=True, repr=False)
class Documents(Mask):
    """Tokens of the same document see each other as `mask` says, from the document's start on.

    For dense calls, whose batch rows then have the same documents. `wrap_ring_attn_varlen_func`
    takes documents as `cu_seqlens`, and every mask in its documents.

    Args:
        cu_seqlens: document n is positions `[cu_seqlens[n], cu_seqlens[n+1])`: starts at 0, never
            falls, ends at the tokens of the sequence.
        mask: within each document.
    """

    examples: ClassVar[tuple[str, ...]] = (
        "Documents(cu_seqlens=(0, 9, 16, 33, 34, 48))",
        "Documents(cu_seqlens=(0, 20, 20, 48), mask=Prefix(length=(8, 0, 11)))",
    )

    cu_seqlens: Sequence[int]
    mask: Mask = CAUSAL

    def checked(self) -> dict[str, Any]:
        edges = tuple(integer("cu_seqlens of Documents", edge) for edge in self.cu_seqlens)
        if not isinstance(self.mask, Mask):
            raise TypeError(f"mask of Documents must be a mask, got {self.mask!r}.")
        if len(edges) < 2 or edges[0] != 0 or list(edges) != sorted(edges):
            raise ValueError(
                f"cu_seqlens of Documents must start at 0 and never fall, got {list(edges)}; it is "
                "0 and then the end of every document."
            )
        return {"cu_seqlens": edges}

    def bands(self, q: Span, k: Span) -> Iterable[Band]:
        edges = self.cu_seqlens
        q0, q1, k0, k1, _, _ = reach(q, k)
        first = max(0, bisect_right(edges, max(q0, k0)) - 1)
        last = min(len(edges) - 1, bisect_left(edges, min(q1, k1)))
        for number in range(first, last):
            start, stop = edges[number], edges[number + 1]
            box = Band(start, stop, start, stop)
            mine = (x._replace(position=x.position - start, document=number) for x in (q, k))
            for band in self.mask.bands(*mine):
                yield band.moved(start).meet(box)

    def sees(self, query: Any, key: Any, document: int = 0) -> Any:
        seen: Any = False
        for number, (start, stop) in enumerate(pairwise(self.cu_seqlens)):
            inside = (query >= start) & (query < stop) & (key >= start) & (key < stop)
            seen = seen | (inside & self.mask.sees(query - start, key - start, number))
        return seen

    def check(self, lengths: Sequence[tuple[int, int]]) -> None:
        for queries, keys in lengths:
            if {queries, keys} != {self.cu_seqlens[-1]}:
                raise ValueError(
                    "cu_seqlens of Documents must end at the tokens of all shards together, "
                    f"{keys}, got {self.cu_seqlens[-1]}; in a packed call the op takes cu_seqlens."
                )
        self.mask.check([(stop - start,) * 2 for start, stop in pairwise(self.cu_seqlens)])
