"""The pattern of dilated attention as rows and documents. Integers only, no torch.

Note [Dilated attention is packed attention]
    Of a branch (w, r), a head of offset s uses every r-th token of each segment of w tokens, from
    the s-th on. Kept alone, these tokens are a packed sequence whose documents are the segments,
    and masks that compare positions mean the same as before. Segments that lie inside one rank's
    shard are all alike and become rows of the batch: one tile for all of them, however many there
    are. At most the first and the last segment of a shard reach beyond it; they are spans of a
    layout, over which any exchange works as it is.

Source: Ding et al., "LongNet: Scaling Transformers to 1,000,000,000 Tokens", arXiv 2307.02486.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from nnscaler_ring.core.plan.span import Span

GROUPINGS = ("mod", "block")
"""How offsets are given to heads: head j has `j % r`, or heads have them in contiguous blocks."""


class Branch(NamedTuple):
    """Segments of `length` tokens, of which a head uses every `rate`-th."""

    length: int
    rate: int


class HeadOffsets(NamedTuple):
    """The offsets of heads, for ranks that hold a part of the KV heads.

    Args:
        grouping: "mod": KV head j has offset `j % r`, as in the LongNet paper; "block": heads in r
            contiguous blocks of ceil(heads / r), as in torchscale.
        first_kv_head: this rank's first KV head of all.
        num_kv_heads: all KV heads; None: those that this rank passes.
    """

    grouping: str = "mod"
    first_kv_head: int = 0
    num_kv_heads: int | None = None

    def offset(self, kv_head: int, rate: int, num_kv_heads: int) -> int:
        """Of this rank's `kv_head`-th KV head of `num_kv_heads`, in a branch of this rate."""
        head = self.first_kv_head + kv_head
        if self.grouping == "mod":
            return head % rate
        heads = num_kv_heads if self.num_kv_heads is None else self.num_kv_heads
        return head // -(-heads // rate)


class HeadGroup(NamedTuple):
    """KV heads `[start, stop)` in steps, alike in their offset in each of some branches."""

    start: int
    stop: int
    step: int
    offsets: tuple[int, ...]

    @property
    def heads(self) -> slice:
        """The KV heads, to index a tensor with."""
        return slice(self.start, self.stop, self.step)


def head_groups(
    branches: Sequence[Branch], head_offsets: HeadOffsets, num_kv_heads: int
) -> list[HeadGroup]:
    """All KV heads that this rank passes, by their offsets."""
    members: dict[tuple[int, ...], list[int]] = {}
    for head in range(num_kv_heads):
        offsets = tuple(head_offsets.offset(head, b.rate, num_kv_heads) for b in branches)
        members.setdefault(offsets, []).append(head)
    groups = []
    for offsets, heads in members.items():
        step = heads[1] - heads[0] if len(heads) > 1 else 1
        assert heads == list(range(heads[0], heads[-1] + 1, step)), heads
        groups.append(HeadGroup(heads[0], heads[-1] + 1, step, offsets))
    return groups


class Strip(NamedTuple):
    """The tokens of one segment that a shard holds and a head uses.

    They are rows `[start, stop)` of the shard in steps, and `span` of the rows that are kept.
    """

    branch: int
    start: int
    stop: int
    step: int
    span: Span

    @property
    def rows(self) -> slice:
        """The rows, to index a tensor with."""
        return slice(self.start, self.stop, self.step)


@dataclass(frozen=True)
class WholeSegments:
    """`count` segments of `length` tokens, from row `start` of the shard on."""

    start: int
    count: int
    length: int


def whole_segments(start: int, stop: int, length: int) -> WholeSegments:
    """The segments inside a shard that holds tokens `[start, stop)`."""
    first, last = -(-start // length), stop // length
    return WholeSegments(first * length - start, max(0, last - first), length)


@dataclass(frozen=True)
class SpanningSegments:
    """The layout of what a head group uses of segments that reach beyond a shard, all branches.

    A document is a segment of a branch. Ragged last segments count, too: they are not like the
    others. `token_lens` are the tokens of every shard.
    """

    token_lens: tuple[int, ...]
    branches: tuple[Branch, ...]
    offsets: tuple[int, ...]

    @property
    def shard_lens(self) -> tuple[int, ...]:
        return tuple(
            sum(strip.span.length for strip in self.strips(rank))
            for rank in range(len(self.token_lens))
        )

    def spans(self, rank: int) -> tuple[Span, ...]:
        return tuple(strip.span for strip in self.strips(rank))

    def positions(self, rank: int) -> tuple[range, ...]:
        """In the whole sequence; the spans count in each segment."""
        first = sum(self.token_lens[:rank])
        return tuple(
            range(first + strip.start, first + strip.stop, strip.step)
            for strip in self.strips(rank)
        )

    def strips(self, rank: int) -> list[Strip]:
        """Where the spans are in the shard."""
        ends = list(accumulate(self.token_lens, initial=0))
        first, last = ends[rank], ends[rank + 1]
        strips: list[Strip] = []
        row = 0
        for number, (branch, offset) in enumerate(zip(self.branches, self.offsets, strict=True)):
            for segment in _spanning(first, last, branch.length):
                begin = segment * branch.length + offset
                used = range(begin, min(last, (segment + 1) * branch.length), branch.rate)
                # Tokens before the shard: rounded up to whole steps.
                before = max(0, -(-(first - begin) // branch.rate))
                used = used[before:]
                if not used:
                    continue
                document = segment * len(self.branches) + number
                span = Span(row, before, len(used), document)
                strips.append(
                    Strip(number, used.start - first, used[-1] + 1 - first, used.step, span)
                )
                row += len(used)
        return strips


def _spanning(first: int, last: int, length: int) -> list[int]:
    """The segments that a shard of tokens `[first, last)` holds a part of, ascending."""
    if first == last:
        return []
    whole = range(-(-first // length), last // length)
    return [n for n in sorted({first // length, (last - 1) // length}) if n not in whole]
