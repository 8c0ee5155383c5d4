"""Sequence layouts: which tokens each rank holds. Integers only, no torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from nnscaler_ring.core.plan.folded import FoldedDocuments
from nnscaler_ring.core.plan.span import (
    InSpans,
    LayoutOfCalls,
    SequenceLayout,
    Span,
    documents_or_one,
    runs_to_spans,
)

__all__ = [
    "LAYOUTS",
    "Contiguous",
    "FoldedDocuments",
    "PackedDocuments",
    "SequenceLayout",
    "Span",
    "Striped",
    "Zigzag",
    "ZigzagDocuments",
]


@dataclass(frozen=True)
class Contiguous(InSpans):
    """Rank r holds the r-th run of tokens; the runs may differ in length."""

    shard_lens: tuple[int, ...]

    @classmethod
    def for_shards(
        cls, shard_lens: Sequence[int], cu_seqlens: Sequence[int] | None = None
    ) -> Contiguous:
        """The layout in which rank r holds `shard_lens[r]` tokens."""
        return cls(tuple(shard_lens))

    def spans(self, rank: int) -> tuple[Span, ...]:
        return runs_to_spans([(sum(self.shard_lens[:rank]), self.shard_lens[rank])])


@dataclass(frozen=True)
class Zigzag(InSpans):
    """Rank r of N holds chunks r and 2N-1-r of 2N, so that causal work is balanced.

    Chunk c is tokens `[c*T//2N, (c+1)*T//2N)` for any total T, divisible or not.

    Source: zhuzilin, "ring-flash-attention" issue 2; Llama 3 report, arXiv 2407.21783, 3.3.2.
    """

    total: int
    world_size: int

    @classmethod
    def for_shards(
        cls, shard_lens: Sequence[int], cu_seqlens: Sequence[int] | None = None
    ) -> Zigzag:
        """The zigzag layout of as many tokens over as many ranks."""
        return cls(sum(shard_lens), len(shard_lens))

    @property
    def shard_lens(self) -> tuple[int, ...]:
        return tuple(sum(n for _, n in self._chunks(r)) for r in range(self.world_size))

    def spans(self, rank: int) -> tuple[Span, ...]:
        return runs_to_spans(self._chunks(rank))

    def _chunks(self, rank: int) -> list[tuple[int, int]]:
        chunks = 2 * self.world_size
        edges = [
            (c * self.total // chunks, (c + 1) * self.total // chunks)
            for c in (rank, chunks - 1 - rank)
        ]
        return [(start, stop - start) for start, stop in edges]


@dataclass(frozen=True)
class ZigzagDocuments(InSpans):
    """Zigzag within every document: rank r holds its two chunks of each, document by document.

    Document n is tokens `[cu_seqlens[n], cu_seqlens[n+1])`; its chunks are those of `Zigzag`. So
    TransformerEngine and others that compute packed documents in zigzag order want them.
    """

    cu_seqlens: tuple[int, ...]
    world_size: int

    @classmethod
    def for_shards(
        cls, shard_lens: Sequence[int], cu_seqlens: Sequence[int] | None = None
    ) -> ZigzagDocuments:
        """The layout of as many tokens over as many ranks."""
        return cls(documents_or_one(cu_seqlens, sum(shard_lens)), len(shard_lens))

    @property
    def shard_lens(self) -> tuple[int, ...]:
        return tuple(sum(span.length for span in self.spans(r)) for r in range(self.world_size))

    def spans(self, rank: int) -> tuple[Span, ...]:
        return runs_to_spans(
            [
                (start + position, length)
                for start, stop in pairwise(self.cu_seqlens)
                for position, length in Zigzag(stop - start, self.world_size)._chunks(rank)
            ]
        )


@dataclass(frozen=True)
class Striped(InSpans):
    """Token t lives on rank t mod N: causal work is balanced in every step.

    Source: Brandon et al., "Striped Attention", arXiv 2311.09431.
    """

    total: int
    world_size: int

    @classmethod
    def for_shards(
        cls, shard_lens: Sequence[int], cu_seqlens: Sequence[int] | None = None
    ) -> Striped:
        """The striped layout of as many tokens over as many ranks."""
        return cls(sum(shard_lens), len(shard_lens))

    @property
    def shard_lens(self) -> tuple[int, ...]:
        return tuple(len(range(r, self.total, self.world_size)) for r in range(self.world_size))

    def spans(self, rank: int) -> tuple[Span, ...]:
        length = len(range(rank, self.total, self.world_size))
        return (Span(0, rank, length, stride=self.world_size),) if length else ()


@dataclass(frozen=True)
class PackedDocuments(InSpans):
    """Documents packed one after another, their tokens held as in the layout `tokens`.

    Document n is tokens `[cu_seqlens[n], cu_seqlens[n+1])`. Positions count so that the last token
    of a document stands where the last of its keys stands (bottom-right alignment, as in
    flash-attn): for queries pass the keys' `cu_seqlens` as `cu_seqlens_k`.
    """

    tokens: SequenceLayout
    cu_seqlens: tuple[int, ...]
    cu_seqlens_k: tuple[int, ...]

    @property
    def shard_lens(self) -> tuple[int, ...]:
        return self.tokens.shard_lens

    def spans(self, rank: int) -> tuple[Span, ...]:
        return tuple(piece for span in self.tokens.spans(rank) for piece in self._cut(span))

    def positions(self, rank: int) -> tuple[range, ...]:
        """In the packed sequence; the spans count in each document."""
        return self.tokens.positions(rank)

    def _cut(self, span: Span) -> list[Span]:
        cu, cu_k = self.cu_seqlens, self.cu_seqlens_k
        pieces = []
        done, document = 0, bisect_right(cu, span.position) - 1
        while done < span.length:
            # Tokens of the span before the document's end, rounded up to whole strides.
            stop = min(span.length, -(-(cu[document + 1] - span.position) // span.stride))
            if stop > done:
                token = span.position + done * span.stride
                position = token - cu[document + 1] + cu_k[document + 1] - cu_k[document]
                pieces.append(Span(span.row + done, position, stop - done, document, span.stride))
                done = stop
            document += 1
        return pieces


LAYOUTS: dict[str, LayoutOfCalls] = {
    "contiguous": Contiguous,
    "zigzag": Zigzag,
    "striped": Striped,
    "folded": FoldedDocuments,
}
"""Layouts by name. A new one is a class with `for_shards`, `shard_lens` and `spans` that takes
`positions` from `InSpans`, listed here."""
