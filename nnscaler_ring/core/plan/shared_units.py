"""The layout of a mesh of sequence and heads: a row of the mesh holds what one rank would hold."""

from __future__ import annotations

from dataclasses import dataclass

from nnscaler_ring.core.plan.span import InSpans, SequenceLayout, Span, even_edges


@dataclass(frozen=True)
class SharedUnits(InSpans):
    """Rank i * ways + j holds the j-th of `ways` even parts of what rank i of `units` holds.

    The parts are cut in the order of the rows and differ by at most one token.
    """

    units: SequenceLayout
    ways: int

    @property
    def shard_lens(self) -> tuple[int, ...]:
        edges = [even_edges(length, self.ways) for length in self.units.shard_lens]
        return tuple(some[n + 1] - some[n] for some in edges for n in range(self.ways))

    def spans(self, rank: int) -> tuple[Span, ...]:
        unit, part = divmod(rank, self.ways)
        edges = even_edges(self.units.shard_lens[unit], self.ways)
        first, last = edges[part], edges[part + 1]
        found = []
        for span in self.units.spans(unit):
            start, stop = max(first, span.row), min(last, span.row + span.length)
            if start < stop:
                position = span.position + (start - span.row) * span.stride
                found.append(
                    span._replace(row=start - first, position=position, length=stop - start)
                )
        return tuple(found)
