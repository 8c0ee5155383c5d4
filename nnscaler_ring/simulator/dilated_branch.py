"""One branch of dilated attention as a layout: the tokens that take part, and who holds them."""

from __future__ import annotations

from dataclasses import dataclass

from nnscaler_ring.core.plan.span import InSpans, Span


@dataclass(frozen=True)
class DilatedBranch(InSpans):
    """Every `dilation`-th token of each segment, over contiguous shards of equal length.

    Tokens of the branch see each other within a segment; `Span.document` is the segment. A rank's
    rows are its tokens that take part, in order.

    Source: Ding et al., "LongNet", arXiv 2307.02486, section 2.3.
    """

    tokens: int
    ranks: int
    segment: int
    dilation: int
    offset: int = 0

    def __post_init__(self) -> None:
        if self.segment % self.dilation:
            raise ValueError(
                f"dilation must divide segment={self.segment}, got {self.dilation}; "
                "powers of two do."
            )

    @property
    def shard_lens(self) -> tuple[int, ...]:
        return tuple(self._count(*self._range(rank)) for rank in range(self.ranks))

    def spans(self, rank: int) -> tuple[Span, ...]:
        start, stop = self._range(rank)
        spans = []
        row = 0
        for segment in range(start // self.segment, -(-stop // self.segment)):
            edges = max(start, segment * self.segment), min(stop, (segment + 1) * self.segment)
            length = self._count(*edges)
            if length:
                spans.append(Span(row, self._next(edges[0]), length, segment, self.dilation))
            row += length
        return tuple(spans)

    def _range(self, rank: int) -> tuple[int, int]:
        return rank * self.tokens // self.ranks, (rank + 1) * self.tokens // self.ranks

    def _next(self, token: int) -> int:
        """The first token of the branch at or after this one."""
        return token + (self.offset - token) % self.dilation

    def _count(self, start: int, stop: int) -> int:
        return len(range(self._next(start), stop, self.dilation))


def longnet_branches(tokens: int, first_segment: int) -> list[tuple[int, int]]:
    """(segment, dilation) doubled together until a segment holds the whole sequence."""
    branches = [(first_segment, 1)]
    while branches[-1][0] < tokens:
        segment, dilation = branches[-1]
        branches.append((2 * segment, 2 * dilation))
    return branches
