"""The all-gather exchange: all keys at once, and one reduce-scatter of their gradients.

The fewest messages. Bytes: (ranks - 1) shards each way (of the longest length), whatever the mask.
Memory: O(tokens) per rank, which the other exchanges avoid.

Source: Llama 3 report, arXiv 2407.21783, section 3.3.2.
"""

from __future__ import annotations

from nnscaler_ring.core.exchange.program import (
    OWN,
    USUAL,
    Compute,
    Cut,
    Free,
    Gather,
    Program,
    Scatter,
)
from nnscaler_ring.core.plan.schedule import Schedule


def all_gather(schedule: Schedule, rank: int, cut: Cut = USUAL) -> Program:
    """Gather all keys and values, compute once, reduce-scatter the gradients.

    `cut` changes nothing: there are no messages between two ranks.
    """
    lens = schedule.k_lens
    rows = tuple((source, 0, n) for source, n in enumerate(lens))
    place = OWN if len(lens) == 1 else 1
    compute = Compute(place, rows, tuple(schedule.tiles(rank, range(len(lens)))))
    if place == OWN:
        return Program(rank, lens, (compute,), (compute,))
    forward = (Gather(place), compute, Free(place))
    return Program(rank, lens, forward, (Gather(place), compute, Free(place), Scatter(place)))
