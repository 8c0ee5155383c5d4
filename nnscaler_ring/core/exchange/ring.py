"""The ring exchange: whole shards travel from neighbour to neighbour.

Every shard of K and V travels the whole ring, and the sum of its gradients after it. For fabrics
where only neighbour links are fast. Bytes: (ranks - 1) shards each way, whatever the mask. Memory:
O(tokens / ranks), two shards of K and V and two of their gradients.

Source: Liu et al., "Ring Attention with Blockwise Transformers", arXiv 2310.01889.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from nnscaler_ring.core.exchange.program import (
    OWN,
    USUAL,
    Action,
    Add,
    Compute,
    Cut,
    Free,
    Post,
    Program,
    Receive,
    Send,
    Wait,
    kept,
)
from nnscaler_ring.core.plan.schedule import Schedule


def ring(schedule: Schedule, rank: int, cut: Cut = USUAL) -> Program:
    """Every shard passes by, the own one first, then those of the ranks to the left.

    The shard of the rank at distance n lies in place n; `cut` changes nothing, shards are whole.
    """
    ranks, lens = schedule.world_size, schedule.k_lens
    sources = [(rank - distance) % ranks for distance in range(ranks)]
    shards = [
        Compute(place, ((source, 0, lens[source]),), tuple(schedule.tiles(rank, (source,))))
        for place, source in enumerate(sources)
    ]
    passes = (kept(lambda some=some: some(shards), ranks) for some in (_forward, _backward))  # type: ignore[misc]
    return Program(rank, lens, *passes)


def _forward(shards: Sequence[Compute]) -> Iterator[Action]:
    """Each shard is computed while it goes on to the right and the next one comes."""
    for shard in shards:
        if shard.place + 1 < len(shards):
            yield _keys(shards, shard.place)
        yield shard
        if shard.place + 1 < len(shards):
            yield Wait(shard.place + 1)
        if shard.place != OWN:
            yield Free(shard.place)


def _backward(shards: Sequence[Compute]) -> Iterator[Action]:
    """The same; the sum of the gradients of a shard, so far, comes one computation after it."""
    ranks = len(shards)
    for shard in shards:
        place = shard.place
        if place + 1 < ranks:
            yield _keys(shards, place)
        yield shard
        if place != OWN:
            if place > 1:
                yield from _settle(shards, place)
            yield _gradients(shards, place)
        if place + 1 < ranks:
            yield Wait(place + 1)
        if place != OWN:
            yield Free(place)
    if ranks > 1:
        yield from _settle(shards, OWN)


def _keys(shards: Sequence[Compute], place: int) -> Post:
    """A shard to the right, the next one from the left."""
    return _onward(shards, place, place + 1, place + 1, "keys")


def _gradients(shards: Sequence[Compute], place: int) -> Post:
    """The sum for a shard to the right; that of the shard that comes next, at last the own one."""
    return _onward(shards, place, len(shards) + place, place + 1, "gradients")


def _onward(
    shards: Sequence[Compute],
    place: int,
    new: int,
    following: int,
    carries: Literal["keys", "gradients"],
) -> Post:
    ranks = len(shards)
    rank = shards[OWN].rows[0][0]
    left, right = (rank - 1) % ranks, (rank + 1) % ranks
    wide = carries == "gradients"
    ((_, _, length),) = shards[place].rows
    send = Send(right, place, ((0, length),), True, wide)
    receive = Receive(left, new, shards[following % ranks].rows, True, wide)
    return Post(new, carries, (send,), (receive,))


def _settle(shards: Sequence[Compute], place: int) -> Iterator[Action]:
    """Wait for the sum that the shard's other ranks made, and add to it."""
    ranks = len(shards)
    arrived = ranks + (place - 1) % ranks
    yield Wait(arrived)
    ((_, _, length),) = shards[place].rows
    yield Add(arrived, place, ((0, length),))
