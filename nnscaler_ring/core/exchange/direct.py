"""The direct exchange: every rank sends every other just the rows that it reads.

Note [One order of messages]
    NCCL matches messages by the order of posts (Note [Messages under NCCL] in transport.py), so
    every rank goes through one sequence: in the backward pass keys 1, keys 2, gradients 1, keys 3,
    gradients 2, ... A rank leaves out the rounds in which it has nothing to send or receive. Where
    it leaves out the next one, the gradients of this one come before the keys of a later one: these
    are then posted after the computation, not before it. Gloo has tags and needs none of this.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nnscaler_ring.core.exchange.buffers import Buffer, Home
from nnscaler_ring.core.exchange.contract import GradientStep, Keys, KVExchange, Sent
from nnscaler_ring.core.exchange.rounds import (
    BACKWARD_KEYS,
    FORWARD_KEYS,
    Distance,
    Round,
    Rounds,
)
from nnscaler_ring.core.plan.schedule import Rows, Schedule, Step, row_count
from nnscaler_ring.core.ranks.transport import Kind, Message, Transfer, Transport
from nnscaler_ring.core.sums.online_softmax import accumulation_dtype
from nnscaler_ring.core.sums.row_sum import RowSum


class DirectPlan:
    """At step s, rank r receives from r - s and sends to r + s, only the rows that are read.

    Each step is a permutation, so no link carries two messages. Bytes: the mask's lower bound.
    Memory: O(tokens / ranks), mostly a few messages.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        forward_keys: int = FORWARD_KEYS,
        backward_keys: int = BACKWARD_KEYS,
    ) -> None:
        self.tiles = tuple(schedule.tiles(rank, (rank,)))
        self.rows = ((rank, 0, schedule.k_lens[rank]),)
        distances = [Distance.of(schedule, rank, n) for n in range(1, schedule.world_size)]
        longest = max(schedule.k_lens)
        self.forward_rounds = Rounds(distances, longest, forward_keys)
        self.backward_rounds = Rounds(distances, longest, backward_keys)

    def start(self, transport: Transport) -> KVExchange:
        return _Direct(self, transport)

    def sent(self) -> Sent:
        kv, gradients, summed = 0, 0, 0
        for round_ in self.backward_rounds:
            kv += row_count(round_.outgoing.rows)
            rows = row_count(round_.incoming.rows)
            gradients += 0 if round_.incoming.summed else rows
            summed += rows if round_.incoming.summed else 0
        return Sent(kv, gradients, summed)


class _Direct:
    def __init__(self, plan: DirectPlan, transport: Transport) -> None:
        self._plan = plan
        self._transport = transport

    def steps(self, k: Tensor, v: Tensor) -> Iterator[Keys]:
        for keys, _ in self._arrivals("forward_kv", self._plan.forward_rounds, k, v):
            yield keys

    def gradient_steps(self, k: Tensor, v: Tensor) -> Iterator[GradientStep]:
        self._home = Home(k, v)
        homebound: _Homebound | None = None
        for keys, round_ in self._arrivals("backward_kv", self._plan.backward_rounds, k, v):
            if round_ is None:
                yield self._home.step(keys)
                continue
            step = GradientStep(*keys, RowSum(keys.k), RowSum(keys.v))
            yield step
            last, homebound = homebound, self._send_home(round_, step, k, v)
            del step, keys
            if last:
                last.settle(self._home)
        if homebound:
            homebound.settle(self._home)

    def gradients(self) -> tuple[Tensor, Tensor]:
        return self._home.dk.current(), self._home.dv.current()

    def _arrivals(
        self, kind: Kind, rounds: Rounds, k: Tensor, v: Tensor
    ) -> Iterator[tuple[Keys, Round | None]]:
        """The local keys, then every round's, each yielded while the next is under way."""
        coming = iter(rounds)
        following = next(coming, None)
        under_way = self._post(kind, following, k, v) if following else None
        yield Keys(k, v, self._plan.tiles, self._plan.rows), None
        while round_ := following:
            transfer, buffer = under_way or self._post(kind, round_, k, v)
            transfer.wait()
            following = next(coming, None)
            # Note [One order of messages]
            late = (
                following is not None
                and kind == "backward_kv"
                and self._transport.in_order
                and following.number > round_.number + 1
            )
            under_way = self._post(kind, following, k, v) if following and not late else None
            incoming = round_.incoming
            rows = [(incoming.source, *run) for run in incoming.rows]
            yield Keys(buffer.k, buffer.v, incoming.tiles, rows), round_

    def _post(self, kind: Kind, round_: Round, k: Tensor, v: Tensor) -> tuple[Transfer, Buffer]:
        incoming, outgoing = round_.incoming, round_.outgoing
        buffer = Buffer(k, v, row_count(incoming.rows), k.dtype)
        receives = buffer.messages(incoming.source, incoming.is_one_piece(k.shape[0]))
        sends = _outgoing_messages(round_.target, outgoing, k, v)
        return self._transport.post(kind, sends, receives), buffer

    def _send_home(self, round_: Round, step: GradientStep, k: Tensor, v: Tensor) -> _Homebound:
        sends = []
        if round_.incoming.rows:
            dtype = _gradient_dtype(round_.incoming, k.dtype)
            sends = [
                Message(round_.incoming.source, total.current().to(dtype).contiguous())
                for total in (step.dk, step.dv)
            ]
        rows = row_count(round_.outgoing.rows)
        returning = Buffer(k, v, rows, _gradient_dtype(round_.outgoing, k.dtype))
        receives = returning.messages(round_.target, apart=True)
        transfer = self._transport.post("gradient", sends, receives)
        return _Homebound(transfer, round_.outgoing.rows, returning)


class _Homebound(NamedTuple):
    """Gradients under way to and from this rank."""

    transfer: Transfer
    rows: Rows
    returning: Buffer

    def settle(self, home: Home) -> None:
        """Wait for them and add those that came home."""
        self.transfer.wait()
        home.add_(self.rows, self.returning.k, self.returning.v)


def _outgoing_messages(target: int, step: Step, k: Tensor, v: Tensor) -> list[Message]:
    """K and V of a step's rows: apart where that saves a copy, else packed into one message."""
    if step.is_one_piece(k.shape[0]):
        rows = slice(*step.rows[0])
        return [Message(target, x[:, rows].contiguous()) for x in (k, v)]
    buffer = Buffer(k, v, row_count(step.rows), k.dtype)
    offset = 0
    for start, stop in step.rows:
        piece = slice(offset, offset + stop - start)
        buffer.k[:, piece] = k[:, start:stop]
        buffer.v[:, piece] = v[:, start:stop]
        offset += stop - start
    return buffer.messages(target, apart=False)


def _gradient_dtype(step: Step, dtype: torch.dtype) -> torch.dtype:
    return accumulation_dtype(dtype) if step.summed else dtype
