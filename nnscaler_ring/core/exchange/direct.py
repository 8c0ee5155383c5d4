"""The direct exchange: every rank sends every other just the rows that it reads.

At step s, rank r receives from r - s and sends to r + s (modulo the number of ranks). Every step is
a permutation, so no link carries two messages. Bytes: the mask's lower bound. Memory: O(tokens /
ranks), mostly a few messages.

Note [One order of messages]
    NCCL matches messages by the order of posts (Note [Messages under NCCL] in transport.py), so
    every rank goes through one sequence: in the backward pass keys 1, keys 2, gradients 1, keys 3,
    gradients 2, ... A rank leaves out the rounds in which it has nothing to send or receive. Where
    it leaves out the next one, the gradients of this one come before the keys of a later one: these
    are then posted after the computation, not before it. Gloo tells keys from gradients and needs
    none of this: see Note [Two rules of matching] in program.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
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
from nnscaler_ring.core.exchange.rounds import Round, Rounds, rounds_of
from nnscaler_ring.core.plan.schedule import KeyRows, Schedule, Step, row_count


def direct(schedule: Schedule, rank: int, cut: Cut = USUAL) -> Program:
    """Every rank sends every other just the rows that it reads, in messages of a bounded length."""
    own = Compute(OWN, ((rank, 0, schedule.k_lens[rank]),), tuple(schedule.tiles(rank, (rank,))))
    lengths = cut.forward_keys, cut.backward_keys
    forward, backward = rounds_of(schedule, rank, *lengths, listed=cut.listed)
    return Program(
        rank,
        schedule.k_lens,
        kept(lambda: _forward(own, rank, forward), forward.most),
        kept(lambda: _backward(own, rank, backward), backward.most),
    )


def _forward(own: Compute, rank: int, rounds: Rounds) -> Iterator[Action]:
    """While a round's keys are computed, the next round's are under way."""
    coming = iter(rounds)
    following = next(coming, None)
    if following:
        yield _keys(following, rank, 1)
    yield own
    for place in count(1):
        round_ = following
        if round_ is None:
            return
        yield Wait(place)
        following = next(coming, None)
        if following:
            yield _keys(following, rank, place + 1)
        if round_.incoming.rows:
            yield _compute(round_, place)
            yield Free(place)


def _backward(own: Compute, rank: int, rounds: Rounds) -> Iterator[Action]:
    """The same, and the last round's gradients are under way as well. Odd places hold keys."""
    coming = iter(rounds)
    following = next(coming, None)
    if following:
        yield _keys(following, rank, 1)
    yield own
    settling: list[Action] = []
    for place in count(1, 2):
        round_ = following
        if round_ is None:
            break
        yield Wait(place)
        following = next(coming, None)
        # Note [One order of messages]
        late = following is not None and following.number > round_.number + 1
        if following:
            yield _keys(following, rank, place + 2, "kinds" if late else None)
        if round_.incoming.rows:
            yield _compute(round_, place)
            yield Free(place)
        yield _gradients(round_, rank, place)
        yield from settling
        settling = [Wait(place + 1)]
        if round_.outgoing.rows:
            settling.append(Add(place + 1, OWN, round_.outgoing.rows))
        if following and late:
            yield _keys(following, rank, place + 2, "order")
    yield from settling


def _keys(
    round_: Round, rank: int, place: int, only: Literal["kinds", "order"] | None = None
) -> Post:
    incoming, outgoing = round_.incoming, round_.outgoing
    sends: tuple[Send, ...] = ()
    receives: tuple[Receive, ...] = ()
    if outgoing.rows:
        sends = (Send(round_.target, OWN, outgoing.rows, outgoing.whole),)
    if incoming.rows:
        rows = _rows_of(incoming.source, incoming)
        receives = (Receive(incoming.source, place, rows, incoming.whole),)
    return Post(place, "keys", sends, receives, only)


def _compute(round_: Round, place: int) -> Compute:
    incoming = round_.incoming
    return Compute(place, _rows_of(incoming.source, incoming), incoming.tiles)


def _gradients(round_: Round, rank: int, place: int) -> Post:
    incoming, outgoing = round_.incoming, round_.outgoing
    sends: tuple[Send, ...] = ()
    receives: tuple[Receive, ...] = ()
    if incoming.rows:
        rows = ((0, row_count(incoming.rows)),)
        sends = (Send(incoming.source, place, rows, True, incoming.summed),)
    if outgoing.rows:
        mine = _rows_of(rank, outgoing)
        receives = (Receive(round_.target, place + 1, mine, True, outgoing.summed),)
    return Post(place + 1, "gradients", sends, receives)


def _rows_of(source: int, step: Step) -> KeyRows:
    return tuple((source, start, stop) for start, stop in step.rows)
