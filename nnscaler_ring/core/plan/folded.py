"""The folded layout of packed documents: equal tokens and equal causal pairs on every rank.

Note [Documents as fluids]
    Fold a document in the middle, so that its first token lies beside its last, its second beside
    its last but one, and so on. Of a document of L tokens two such tokens together see L + 1 keys,
    wherever the fold is cut: the document is a fluid of density (L + 1) / 2 pairs per token. So a
    rank that must get t tokens and p pairs is filled from one document that is denser than p / t
    and one that is sparser, in the one proportion that gives both. Dense documents are taken with
    the least dense first, sparse ones with the most dense first; then what is left can always be
    mixed in the same way (the alias method of sampling). Ranks are filled one after another, so a
    document lies on consecutive ranks, and at a border between two ranks, or two nodes, at most one
    dense and one sparse document are cut.

    Source of the alias method: Walker, "An efficient method for generating discrete random
    variables with general distributions", ACM TOMS 3(3), 1977.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from nnscaler_ring.core.plan.span import (
    InSpans,
    Span,
    documents_or_one,
    even_lens,
    runs_to_spans,
)


@dataclass(frozen=True)
class FoldedDocuments(InSpans):
    """Packed documents, folded and dealt out: every rank has the same work under a causal mask.

    Document n is tokens `[cu_seqlens[n], cu_seqlens[n+1])`. Ranks differ by at most one token, and
    by a part in a thousand or so of their visible pairs: see Note [Documents as fluids]. A rank's
    rows ascend in the packed sequence. One document over N ranks, its length a multiple of 2N, is
    the zigzag layout. Without a causal mask the work is balanced too; with a window it is the
    better balanced the fewer documents are longer than the window.
    """

    cu_seqlens: tuple[int, ...]
    world_size: int

    @classmethod
    def for_shards(
        cls, shard_lens: Sequence[int], cu_seqlens: Sequence[int] | None = None
    ) -> FoldedDocuments:
        """The folded layout of as many tokens over as many ranks."""
        return cls(documents_or_one(cu_seqlens, sum(shard_lens)), len(shard_lens))

    @property
    def shard_lens(self) -> tuple[int, ...]:
        return even_lens(self.cu_seqlens[-1], self.world_size)

    def spans(self, rank: int) -> tuple[Span, ...]:
        return runs_to_spans(_deal(self.cu_seqlens, self.world_size)[rank])


class Folded(NamedTuple):
    """A document of `length` tokens from `start` on, in folded order."""

    start: int
    length: int

    def pairs_before(self, x: int) -> int:
        """The causal pairs of its first x tokens in folded order."""
        front, back = x // 2, x - x // 2
        return front * (front + 1) // 2 + back * self.length - back * (back - 1) // 2

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """(position, length) of its folded tokens `[start, stop)`: of its front and of its back."""
        front, back = (start // 2, stop // 2), (start - start // 2, stop - stop // 2)
        if front[0] < front[1]:
            yield self.start + front[0], front[1] - front[0]
        if back[0] < back[1]:
            yield self.start + self.length - back[1], back[1] - back[0]


@dataclass
class _Stock:
    """Documents in the order in which they are used up."""

    documents: Sequence[Folded]
    number: int = 0
    used: int = 0
    taken: list[tuple[int, int]] = field(default_factory=list)

    @property
    def document(self) -> Folded | None:
        return self.documents[self.number] if self.number < len(self.documents) else None

    @property
    def left(self) -> int:
        return self.documents[self.number].length - self.used

    def take(self, tokens: int) -> int:
        """Take from the document in use, which has as many; the causal pairs of what was taken."""
        document, start = self.documents[self.number], self.used
        stop = self.used = start + tokens
        self.taken += document.runs(start, stop)
        if stop == document.length:
            self.number, self.used = self.number + 1, 0
        return document.pairs_before(stop) - document.pairs_before(start)


@lru_cache(maxsize=16)
def _deal(cu_seqlens: tuple[int, ...], world_size: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """The runs (position, length) of every rank, ascending. See Note [Documents as fluids]."""
    documents = [
        Folded(start, stop - start) for start, stop in pairwise(cu_seqlens) if start < stop
    ]
    tokens = cu_seqlens[-1]
    pairs = sum(document.pairs_before(document.length) for document in documents)

    def is_dense(document: Folded) -> bool:
        return (document.length + 1) * tokens >= 2 * pairs

    ascending = sorted(documents, key=lambda document: document.length)
    dense = _Stock([document for document in ascending if is_dense(document)])
    sparse = _Stock([document for document in reversed(ascending) if not is_dense(document)])
    dealt = []
    tokens_so_far = pairs_so_far = 0
    for rank in range(1, world_size + 1):
        # What rounding gave earlier ranks too much or too little of, this one makes up for.
        tokens_due = rank * tokens // world_size - tokens_so_far
        tokens_so_far += tokens_due
        pairs_due = rank * pairs // world_size - pairs_so_far
        while tokens_due:
            stock, count = _next_portion(dense, sparse, tokens_due, pairs_due)
            got = stock.take(count)
            tokens_due -= count
            pairs_due -= got
            pairs_so_far += got
        runs = sorted(dense.taken + sparse.taken)
        dense.taken, sparse.taken = [], []
        dealt.append(tuple(runs))
    return tuple(dealt)


def _next_portion(dense: _Stock, sparse: _Stock, tokens: int, pairs: int) -> tuple[_Stock, int]:
    """Which stock to take how many tokens of, for a rank that lacks so many tokens and pairs."""
    rich, poor = dense.document, sparse.document
    if rich is None or poor is None:
        stock = sparse if rich is None else dense
        return stock, min(tokens, stock.left)
    # x tokens of the dense one: x (rich + 1) / 2 + (tokens - x) (poor + 1) / 2 = pairs, rounded.
    over = 2 * pairs - tokens * (poor.length + 1)
    wanted = (2 * over + rich.length - poor.length) // (2 * (rich.length - poor.length))
    of_dense = min(max(wanted, 0), tokens)
    of_sparse = tokens - of_dense
    # A portion that uses up its document comes first: the next document changes the proportion.
    if of_sparse >= sparse.left and of_sparse * dense.left >= of_dense * sparse.left:
        return sparse, sparse.left
    if of_dense:
        return dense, min(of_dense, dense.left)
    return sparse, of_sparse
