"""Stands in for the other ranks: fills the messages of one rank's exchange with what they would be.

The only file of the simulator that knows how the exchanges of `core.exchange` are built: which
plan makes which messages, in which order. The messages themselves are made by the real engine and
kernels from the rows that the other ranks hold, so they are the same bits.

Note [What a peer sends]
    Keys and values are rows of their owner. A gradient is what the peer's backward pass has for
    these keys alone: `attention_backward` over a single step. So a peer's tiles are computed once
    for its own dq and once more for our dk and dv: the price of having one rank's share in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nnscaler_ring.core.engine import attention_backward
from nnscaler_ring.core.exchange import (
    EXCHANGES,
    AllGatherPlan,
    DirectPlan,
    ExchangePlan,
    GradientStep,
    RingPlan,
)
from nnscaler_ring.core.exchange.rounds import Rounds
from nnscaler_ring.core.kernels import AttentionKernel, BackwardTensors
from nnscaler_ring.core.plan.schedule import Rows, Schedule
from nnscaler_ring.core.plan.tile import Tile
from nnscaler_ring.core.ranks.groups import Place, Traffic
from nnscaler_ring.core.ranks.transport import Kind, Message, Transfer, Transport
from nnscaler_ring.core.scores.coordinates import KeyRows
from nnscaler_ring.core.scores.scores import Scores
from nnscaler_ring.core.sums.online_softmax import accumulation_dtype
from nnscaler_ring.core.sums.row_sum import RowSum


class Queries(NamedTuple):
    """What a rank's backward pass needs of its own rows."""

    dout: Tensor
    q: Tensor
    out: Tensor
    softmax_lse: Tensor


class Shares(Protocol):
    """What the other ranks hold, produced when it is asked for."""

    def keys(self, rank: int, rows: Rows | None = None) -> tuple[Tensor, Tensor]:
        """k and v of some of a rank's rows, [batch, rows, num_kv_heads, head_dim]; None: all."""
        ...

    def queries(self, rank: int) -> Queries:
        """A rank's rows of dout, q, out and softmax_lse."""
        ...


def exchange_plan(exchange: str, schedule: Schedule, rank: int) -> ExchangePlan:
    """The real plan of a rank."""
    return EXCHANGES[exchange](schedule, rank)


@dataclass(frozen=True)
class Peers:
    """The other ranks of a call, ready to compute what they would send."""

    schedule: Schedule
    shares: Shares
    kernel: AttentionKernel
    scores: Callable[[int], Scores]
    """Of a rank's rows."""

    def gradients(
        self, rank: int, k: Tensor, v: Tensor, tiles: Sequence[Tile], rows: KeyRows
    ) -> tuple[RowSum, RowSum]:
        """A rank's part of the gradients of some keys, `rows`: Note [What a peer sends]."""
        peer = self.shares.queries(rank)
        step = _OneStep(tiles, rows)
        attention_backward(
            BackwardTensors(peer.dout, None, peer.q, k, v, peer.out, peer.softmax_lse),
            exchange=step,
            kernel=self.kernel,
            scores=self.scores(rank),
        )
        return step.dk, step.dv


class _OneStep:
    """An exchange of a single step, whose sums of gradients can be read afterwards."""

    def __init__(self, tiles: Sequence[Tile], rows: KeyRows) -> None:
        self._tiles = tiles
        self._rows = rows

    def steps(self, k: Tensor, v: Tensor) -> Iterator[Any]:
        raise NotImplementedError("a peer's forward pass is not asked for.")

    def gradient_steps(self, k: Tensor, v: Tensor) -> Iterator[GradientStep]:
        self.dk, self.dv = RowSum(k), RowSum(v)
        yield GradientStep(k, v, self._tiles, self._rows, self.dk, self.dv)

    def gradients(self) -> tuple[Tensor, Tensor]:
        return self.dk.current(), self.dv.current()


class _Arrived(Transfer):
    """Messages that are there already; holds what a real transfer holds, and as long."""

    def __init__(self, messages: Sequence[Message]) -> None:
        super().__init__([], [message.tensor for message in messages])


Answer = Callable[[Sequence[Message]], None]
"""Fills the tensors of a post's receives."""


@dataclass(frozen=True)
class StandIn(Transport):
    """The transport of one rank in one pass; counts what the rank sends as the real one does.

    Args:
        answers: by kind of message, what fills the receives of each post, in order.
        collective: what fills the output of each collective.
        aside: entered while another rank's work is done here, for those who measure this one's.
    """

    answers: dict[Kind, Iterator[Answer]] = field(default_factory=dict)
    collective: Callable[[Kind, Tensor, Tensor], None] | None = None
    aside: Callable[[], Any] = torch.no_grad

    def post(self, kind: Kind, sends: Sequence[Message], receives: Sequence[Message]) -> Transfer:
        self._count(kind, sends)
        if receives:
            answer = next(self.answers[kind])
            with self.aside():
                answer(receives)
        return _Arrived([*sends, *receives])

    def _run(self, kind: Kind, collective: object, output: Tensor, x: Tensor) -> None:
        assert self.collective is not None, kind
        with self.aside():
            self.collective(kind, output, x)


def stand_in(
    plan: ExchangePlan, rank: int, peers: Peers, *, backward: bool, aside: Callable[[], Any]
) -> StandIn:
    """The transport of a rank that follows `plan` in one pass."""
    ranks = peers.schedule.world_size
    answers: dict[Kind, Iterator[Answer]] = {}
    collective = None
    kv_kind: Kind = "backward_kv" if backward else "forward_kv"
    match plan:
        case DirectPlan():
            rounds = plan.backward_rounds if backward else plan.forward_rounds
            answers[kv_kind] = _direct_keys(rounds, peers)
            answers["gradient"] = _direct_gradients(plan.backward_rounds, rank, peers)
        case RingPlan():
            answers[kv_kind] = _ring_keys(plan, peers)
            answers["gradient"] = _ring_gradients(plan, rank, peers)
        case AllGatherPlan():
            collective = _Collectives(rank, peers)
    return StandIn(
        place=Place(None, tuple(range(ranks)), rank),
        traffic=Traffic(),
        op="simulated",
        plan_tag=0,
        answers=answers,
        collective=collective,
        aside=aside,
    )


def _direct_keys(rounds: Rounds, peers: Peers) -> Iterator[Answer]:
    for round_ in rounds:
        step = round_.incoming
        yield lambda receives, step=step: _fill(
            receives, *peers.shares.keys(step.source, step.rows)
        )  # type: ignore[misc]


def _direct_gradients(rounds: Rounds, rank: int, peers: Peers) -> Iterator[Answer]:
    for round_ in rounds:

        def answer(receives: Sequence[Message], round_=round_) -> None:  # type: ignore[no-untyped-def]
            step = round_.outgoing
            if step.rows:
                k, v = peers.shares.keys(rank, step.rows)
                sums = peers.gradients(
                    round_.target, k, v, step.tiles, [(rank, *run) for run in step.rows]
                )
                _fill(receives, *(total.current() for total in sums))

        yield answer


def _ring_keys(plan: RingPlan, peers: Peers) -> Iterator[Answer]:
    for source in plan.sources[1:]:
        yield lambda receives, source=source: _fill(receives, *peers.shares.keys(source))  # type: ignore[misc]
    yield lambda receives: None  # the last step has nothing to wait for


def _ring_gradients(plan: RingPlan, rank: int, peers: Peers) -> Iterator[Answer]:
    """The sums of the ranks between a shard's owner and this rank, owner's right first."""
    ranks = peers.schedule.world_size
    for source in [*plan.sources[2:], rank]:
        between = [(source + n) % ranks for n in range(1, ranks)]
        between = between[: between.index(rank)] if rank in between else between

        def answer(
            receives: Sequence[Message], source: int = source, chain: Sequence[int] = between
        ) -> None:
            k, v = peers.shares.keys(source)
            so_far: list[Tensor] = []
            for peer in chain:
                tiles = tuple(peers.schedule.tiles(peer, (source,)))
                sums = peers.gradients(peer, k, v, tiles, [(source, 0, k.shape[1])])
                for total, before in zip(sums, so_far, strict=False):
                    total.add_(slice(None), before)
                so_far = [total.current().to(accumulation_dtype(k.dtype)) for total in sums]
            _fill(receives, *so_far)

        yield answer


class _Collectives:
    """Gathered keys and scattered gradients of the all-gather exchange, in the order of its calls.

    gloo's reduce-scatter sums a rank's part along its ring: the rank before it first, itself last.
    """

    def __init__(self, rank: int, peers: Peers) -> None:
        self._rank = rank
        self._peers = peers
        self._parts: list[list[Tensor]] = []
        self._calls = 0

    def __call__(self, kind: Kind, output: Tensor, x: Tensor) -> None:
        lens = self._peers.schedule.k_lens
        which = self._calls % 2  # k then v, dk then dv
        self._calls += 1
        if kind == "gradient":
            self._scatter(which, output, x)
            return
        for source, part in enumerate(output.view(len(lens), -1)):
            shard = self._peers.shares.keys(source)[which]
            _padded(part, shard, max(lens))

    def _scatter(self, which: int, output: Tensor, x: Tensor) -> None:
        schedule, ranks = self._peers.schedule, self._peers.schedule.world_size
        if not self._parts:
            shards = [self._peers.shares.keys(rank) for rank in range(ranks)]
            k, v = (torch.cat(parts, dim=1) for parts in zip(*shards, strict=True))
            rows = [(source, 0, length) for source, length in enumerate(schedule.k_lens)]
            start = sum(schedule.k_lens[: self._rank])
            mine = slice(start, start + schedule.k_lens[self._rank])
            for distance in range(1, ranks):
                peer = (self._rank - distance) % ranks
                tiles = tuple(schedule.tiles(peer, range(ranks)))
                sums = self._peers.gradients(peer, k, v, tiles, rows)
                self._parts.append([total.current()[:, mine] for total in sums])
        own = x.view(ranks, -1)[self._rank]
        total = torch.zeros_like(own)
        part = torch.zeros_like(own)
        for number, parts in enumerate(self._parts):
            _padded(part, parts[which].to(own.dtype), max(schedule.k_lens))
            total = part.clone() if number == 0 else total.add_(part)
        output.copy_(total.add_(own))


def _padded(part: Tensor, rows: Tensor, length: int) -> None:
    """Write [batch, rows, ...] into the flat memory of [batch, length, ...]."""
    part.view(rows.shape[0], length, *rows.shape[2:])[:, : rows.shape[1]] = rows


def _fill(receives: Sequence[Message], k: Tensor, v: Tensor) -> None:
    """Write K and V into one message that holds both, or into one each."""
    if len(receives) == 2:
        parts = [message.tensor for message in receives]
    else:
        ((_, whole),) = receives
        parts = [
            p.view(x.shape)
            for p, x in zip(whole.split([k.numel(), v.numel()]), (k, v), strict=True)
        ]
    for part, x in zip(parts, (k, v), strict=True):
        part.copy_(x)
