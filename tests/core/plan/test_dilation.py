"""The pattern as integers: which tokens a head group uses, and where they are kept."""

import random

from nnscaler_ring.core.dilated import DilatedPlan
from nnscaler_ring.core.exchange.program import Compute
from nnscaler_ring.core.plan.dilation import (
    Branch,
    HeadOffsets,
    SpanningSegments,
    head_groups,
    whole_segments,
)
from nnscaler_ring.core.plan.schedule import CAUSAL


def test_every_used_token_is_in_one_place():
    """Whole segments and strips together hold what the definition says, each token once."""
    rng = random.Random(0)
    for _ in range(2000):
        shard_lens = tuple(rng.choice((0, 1, rng.randint(2, 30))) for _ in range(rng.randint(1, 5)))
        length = rng.randint(1, 40)
        rate = rng.randint(1, length)
        offset = rng.randrange(rate)
        rows = SpanningSegments(shard_lens, (Branch(length, rate),), (offset,))
        for rank, tokens in enumerate(shard_lens):
            start = sum(shard_lens[:rank])
            whole = whole_segments(start, start + tokens, length)
            found = [
                (start + whole.start + segment * length + position)
                for segment in range(whole.count)
                for position in range(offset, length, rate)
            ]
            kept = 0
            for strip in rows.strips(rank):
                held = range(strip.start, strip.stop, strip.step)
                assert (strip.span.row, strip.span.length) == (kept, len(held))
                first = (start + held[0]) % length
                assert strip.span.position == (first - offset) // rate
                assert strip.span.document == (start + held[0]) // length
                found += [start + row for row in held]
                kept += len(held)
            used = [t for t in range(start, start + tokens) if t % length % rate == offset]
            assert sorted(found) == used, (shard_lens, length, rate, offset, rank)


def test_head_groups():
    branches = [Branch(8, 1), Branch(8, 2), Branch(8, 3)]
    mod = head_groups(branches, HeadOffsets("mod"), 8)
    assert [(g.start, g.stop, g.step, g.offsets) for g in mod] == [
        (0, 7, 6, (0, 0, 0)),
        (1, 8, 6, (0, 1, 1)),
        (2, 3, 1, (0, 0, 2)),
        (3, 4, 1, (0, 1, 0)),
        (4, 5, 1, (0, 0, 1)),
        (5, 6, 1, (0, 1, 2)),
    ]
    block = head_groups(branches, HeadOffsets("block"), 8)
    assert [(g.start, g.stop, g.offsets) for g in block] == [
        (0, 3, (0, 0, 0)),
        (3, 4, (0, 0, 1)),
        (4, 6, (0, 1, 1)),
        (6, 8, (0, 1, 2)),
    ]
    part = head_groups(branches[1:2], HeadOffsets("block", 3, 8), 2)
    assert [(g.start, g.stop, g.offsets) for g in part] == [(0, 1, (0,)), (1, 2, (1,))]


def test_planning_does_not_grow_with_segments():
    """A million tokens in segments of 64: the tiles of a rank are those of a few segments."""
    branches = [Branch(67, 1), Branch(131, 2)]
    plan = DilatedPlan.of(
        branches, HeadOffsets(), 4, (1 << 18,) * 4, CAUSAL, "direct", 1
    )  # fmt: skip
    parts = [*plan.shared, *(part for parts in plan.alone for part in parts)]
    own = [next(a for a in part.program.forward if isinstance(a, Compute)) for part in parts]
    assert sum(len(compute.tiles) for compute in own) <= 16
