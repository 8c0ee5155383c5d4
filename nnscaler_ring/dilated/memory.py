"""How much memory a rank of a dilated call will hold, from its plan.

The byte model is the planner's: `Sizes` says what a row of each tensor takes, `Memory` has the
components. Parts are computed one after another; what each leaves for the merge stays.
"""

from __future__ import annotations

from dataclasses import dataclass

from nnscaler_ring.core.dilated import DilatedPlan, Part, SpanningRows, WholeSegmentRows
from nnscaler_ring.core.exchange.program import rows_at_once
from nnscaler_ring.core.plan.dilation import Branch, HeadGroup, HeadOffsets
from nnscaler_ring.core.plan.schedule import CAUSAL, FULL
from nnscaler_ring.core.sizes import Memory, Sizes


@dataclass(frozen=True)
class DilatedShape:
    """What a call's plan follows from: branches, heads, shards, and how keys travel."""

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    causal: bool
    head_offsets: HeadOffsets
    exchange: str
    shard_lens: tuple[int, ...]
    sizes: Sizes

    def plan(self, block: int) -> DilatedPlan:
        """The work of the rank that holds a block."""
        branches = [
            Branch(*pair) for pair in zip(self.segment_lengths, self.dilation_rates, strict=True)
        ]
        return DilatedPlan.of(
            branches,
            self.head_offsets,
            self.sizes.num_kv_heads,
            self.shard_lens,
            CAUSAL if self.causal else FULL,
            self.exchange,
            block,
        )


@dataclass(frozen=True)
class DilatedNeeds:
    """What one call needs on one rank, in bytes; `messages` is also in both others."""

    messages: int
    forward: Memory
    training: Memory


def predict_needs(shape: DilatedShape, block: int) -> DilatedNeeds:
    """Bytes that a call holds at its peak, at most: forward alone, and forward and backward.

    Not in it: what a kernel makes inside a call, and score matrices of kernel="reference".
    """
    plan = shape.plan(block)
    ledger = _Ledger(shape.sizes, shape.shard_lens[block], plan)
    return DilatedNeeds(ledger.messages(backward=False), ledger.forward(), ledger.training())


@dataclass(frozen=True)
class _Ledger:
    sizes: Sizes
    rows: int
    plan: DilatedPlan

    def parts(self) -> list[Part]:
        return [*self.plan.shared, *(part for parts in self.plan.alone for part in parts)]

    def messages(self, *, backward: bool) -> int:
        """Count the bytes in messages at one time, which are those of the largest part."""
        sizes = self.sizes
        largest = 0.0
        for part in self.plan.shared:
            rows = rows_at_once(part.program, backward=backward)
            largest = max(largest, rows * self._share(part))
        item = 3 * sizes.sum_itemsize if backward else sizes.itemsize
        return round(largest * sizes.kv_numbers * item)

    def forward(self) -> Memory:
        """Count q, k and v, a float32 sum and one branch beside it, one part, and the result."""
        sizes, item, wide = self.sizes, self.sizes.itemsize, self.sizes.sum_itemsize
        result = sizes.out_numbers * wide + sizes.lse_bytes
        taken = self._largest(sizes.q_numbers * item + 2 * result, sizes.kv_numbers * item)
        kept = sum(self._rows(part.queries) for part in self.plan.shared) * result
        return Memory(
            {
                "q": self.rows * sizes.q_numbers * item,
                "kv": self.rows * sizes.kv_numbers * item,
                "sums": round(self.rows * 2 * result + kept),
                "block": round(taken),
                "messages": self.messages(backward=False),
                "results": self.rows * (sizes.out_numbers * item + sizes.lse_bytes),
            }
        )

    def training(self) -> Memory:
        """Count the backward pass, unless the forward pass needs more."""
        sizes, item, wide = self.sizes, self.sizes.itemsize, self.sizes.sum_itemsize
        q_row = (sizes.q_numbers + 2 * sizes.out_numbers) * item + 2 * sizes.lse_bytes
        taken = self._largest(
            q_row + 2 * sizes.q_numbers * wide, sizes.kv_numbers * (item + 2 * wide)
        )
        gradients = sizes.q_numbers + sizes.kv_numbers
        backward = Memory(
            {
                "q": self.rows * sizes.q_numbers * item,
                "kv": self.rows * sizes.kv_numbers * item,
                "results": self.rows * (2 * sizes.out_numbers * item + sizes.lse_bytes),
                "sums": self.rows * gradients * (wide + item),
                "block": round(taken),
                "messages": self.messages(backward=True),
            }
        )
        return max(self.forward(), backward, key=lambda memory: memory.total)

    def _largest(self, q_row: int, kv_row: int) -> float:
        """The most bytes that a part takes, of so many for a row of queries and of keys."""
        return max(
            (self._rows(p.queries) * q_row + self._rows(p.keys) * kv_row for p in self.parts()),
            default=0.0,
        )

    def _rows(self, selection: object) -> float:
        """Count rows of all heads: half of the heads of ten rows are five rows."""
        assert isinstance(selection, (WholeSegmentRows, SpanningRows)), selection
        if isinstance(selection, SpanningRows):
            count = sum(strip.span.length for strip in selection.strips)
        else:
            (offset,) = selection.group.offsets
            segments = selection.segments
            count = segments.count * len(range(offset, segments.length, selection.rate))
        return count * _heads(selection.group) / self.sizes.num_kv_heads

    def _share(self, part: Part) -> float:
        """The share of all heads that a part computes."""
        assert isinstance(part.queries, SpanningRows), part
        return _heads(part.queries.group) / self.sizes.num_kv_heads


def _heads(group: HeadGroup) -> int:
    return len(range(group.start, group.stop, group.step))
