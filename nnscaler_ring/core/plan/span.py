"""What a layout is, and the runs of tokens that it is made of. Integers only, no torch."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol


class Span(NamedTuple):
    """A run of `length` tokens in a rank's rows, `stride` positions apart.

    Local row `row + n` holds the token at `position + n * stride` of `document`. Only tokens of
    the same document see each other, and masks compare positions.
    """

    row: int
    position: int
    length: int
    document: int = 0
    stride: int = 1

    @property
    def positions(self) -> range:
        """The positions of its tokens, in the order of its rows."""
        return range(self.position, self.position + self.length * self.stride, self.stride)


class SequenceLayout(Hashable, Protocol):
    """Who holds which tokens. Layouts are hashable values; shards may be uneven or empty."""

    @property
    def shard_lens(self) -> tuple[int, ...]:
        """Tokens held by each rank; its length is the number of ranks."""
        ...

    def spans(self, rank: int) -> tuple[Span, ...]:
        """The runs of tokens that `rank` holds, in the order of its rows."""
        ...

    def positions(self, rank: int) -> tuple[range, ...]:
        """Where the tokens of `rank` stand in the whole sequence, in the order of its rows."""
        ...


class LayoutOfCalls(Protocol):
    """What a name in `LAYOUTS` stands for: the layout of any call, from its lengths."""

    def for_shards(
        self, shard_lens: Sequence[int], cu_seqlens: Sequence[int] | None = None
    ) -> SequenceLayout:
        """The layout of as many tokens over as many ranks as in `shard_lens`.

        Args:
            shard_lens: tokens of every rank; only their sum and number count where the layout
                decides by itself who holds how many.
            cu_seqlens: where packed documents begin and end; None: the whole is one document. A
                layout may depend on it, its `shard_lens` should not: an op that is traced knows
                lengths, but no documents.
        """
        ...


class InSpans:
    """Gives a layout with `spans` its `positions`."""

    def spans(self, rank: int) -> tuple[Span, ...]:
        """As in `SequenceLayout`."""
        raise NotImplementedError

    def positions(self, rank: int) -> tuple[range, ...]:
        """As in `SequenceLayout`."""
        return tuple(span.positions for span in self.spans(rank))


def runs_to_spans(chunks: Iterable[tuple[int, int]]) -> tuple[Span, ...]:
    """Spans of (position, length) chunks laid out in rows one after another; touching ones join."""
    spans: list[Span] = []
    row = 0
    for position, length in chunks:
        if spans and spans[-1].position + spans[-1].length == position:
            spans[-1] = spans[-1]._replace(length=spans[-1].length + length)
        elif length:
            spans.append(Span(row, position, length))
        row += length
    return tuple(spans)


def even_edges(total: int, parts: int) -> tuple[int, ...]:
    """Where `total` tokens are cut into `parts` parts that differ by one at most."""
    return tuple(part * total // parts for part in range(parts + 1))


def even_lens(total: int, parts: int) -> tuple[int, ...]:
    """The lengths of these parts."""
    return tuple(stop - start for start, stop in pairwise(even_edges(total, parts)))


def documents_or_one(cu_seqlens: Sequence[int] | None, total: int) -> tuple[int, ...]:
    """The documents as they are given; None: the whole is one."""
    return (0, total) if cu_seqlens is None else tuple(cu_seqlens)
