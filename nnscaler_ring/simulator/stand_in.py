"""Stands in for the other ranks: fills the messages of one rank's program with what they would be.

Note [What a peer sends]
    Keys and values are rows of their owner: a `Receive` says which. A gradient is what the peer's
    own program has for these keys when it sends them. So the part of that program which leads to
    the message is performed here, by the real engine and kernels and over a stand-in of its own:
    the computation of the place that the peer sends from, and the gradients that it has added to
    the place. They may have come from a third rank (a ring's sums come from a whole chain of
    ranks): these are made first. So every message has the bits that it would have.

    A peer's tiles are computed once for its own dq and once more for our dk and dv: the price of
    having one rank's share in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nnscaler_ring.core.engine import attention_backward
from nnscaler_ring.core.exchange import Performance, Program
from nnscaler_ring.core.exchange.program import (
    Action,
    Add,
    Compute,
    Gather,
    Join,
    Post,
    Receive,
    Scatter,
    Wait,
    performed,
    travels_apart,
)
from nnscaler_ring.core.kernels import AttentionKernel, BackwardTensors
from nnscaler_ring.core.plan.schedule import KeyRows, Rows, Schedule
from nnscaler_ring.core.ranks.groups import Place, Traffic
from nnscaler_ring.core.ranks.transport import Kind, Message, Transfer, Transport
from nnscaler_ring.core.scores.scores import Scores


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


class _Arrived(Transfer):
    """Messages that are there already; holds what a real transfer holds, and as long."""

    def __init__(self, messages: Sequence[Message]) -> None:
        super().__init__([], [message.tensor for message in messages])


Fill = Callable[[Receive, Sequence[Tensor]], None]
"""Writes what a message brings into its tensors: K and V in one, or in one each."""

Collective = Callable[[Kind, Tensor, Tensor], None]
"""Fills the output of a collective, from its input and from what the other ranks give."""


@dataclass(frozen=True)
class StandIn(Transport):
    """The transport of one rank in one pass; counts what the rank sends as the real one does.

    Args:
        posts: those of the pass, in order.
        batch: of the tensors.
        keys, gradients: fill the receives of a post.
        collective: does the collectives.
        aside: entered while another rank's work is done here, for those who measure this one's.
        sent: where to put what is sent; None: nobody wants it.
    """

    posts: Iterator[Post] = field(default_factory=lambda: iter(()))
    batch: int = 1
    keys: Fill | None = None
    gradients: Fill | None = None
    collective: Collective | None = None
    aside: Callable[[], Any] = torch.no_grad
    sent: list[Tensor] | None = None

    def post(self, kind: Kind, sends: Sequence[Message], receives: Sequence[Message]) -> Transfer:
        self._count(kind, sends)
        if self.sent is not None:
            self.sent.extend(message.tensor for message in sends)
        action = next(self.posts)
        tensors = iter([message.tensor for message in receives])
        keys = action.carries == "keys"
        fill = self.keys if keys else self.gradients
        for receive in action.receives:
            assert fill is not None, action
            apart = not keys or travels_apart(len(receive.rows), receive.whole, self.batch)
            with self.aside():
                fill(receive, [next(tensors) for _ in range(2 if apart else 1)])
        return _Arrived([*sends, *receives])

    def _run(self, kind: Kind, collective: object, output: Tensor, x: Tensor) -> None:
        assert self.collective is not None, kind
        with self.aside():
            self.collective(kind, output, x)


class Letter(NamedTuple):
    """A message of gradients: the `number`-th, from 0, from `sender` to `receiver` in a pass."""

    sender: int
    receiver: int
    number: int


@dataclass(frozen=True)
class Peers:
    """The other ranks of a call, ready to compute what they would send.

    Args:
        program: of a rank.
        scores: of a rank's rows.
        batch: of the tensors.
    """

    schedule: Schedule
    shares: Shares
    kernel: AttentionKernel
    program: Callable[[int], Program]
    scores: Callable[[int], Scores]
    batch: int
    _backward: dict[int, list[Action]] = field(default_factory=dict)

    def stand_in(self, rank: int, *, backward: bool, aside: Callable[[], Any]) -> StandIn:
        """The transport of a rank that follows its program in one pass."""
        actions = [*performed(self.program(rank).actions(backward=backward), in_order=False)]
        letters = iter(_letters_to(rank, actions).values())
        return self._transport(
            rank,
            actions,
            gradients=lambda receive, tensors: _fill(tensors, *self._content(next(letters))),
            collective=_Collectives(rank, self),
            traffic=Traffic(),
            aside=aside,
        )

    def keys(self, rows: KeyRows) -> tuple[Tensor, Tensor]:
        """k and v of rows of any ranks, one after another."""
        parts = [self.shares.keys(source, runs) for source, runs in _by_source(rows)]
        if len(parts) == 1:
            return parts[0]
        k, v = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return k, v

    def scattered(self, peer: int, to: int, gathered: Collective) -> list[Tensor]:
        """`to`'s part of what a peer puts into its collectives of gradients: of dK, of dV."""
        taken: list[Tensor] = []

        def collective(kind: Kind, output: Tensor, x: Tensor) -> None:
            if kind == "gradient":
                taken.append(x.view(self.schedule.world_size, -1)[to].clone())
            else:
                gathered(kind, output, x)

        actions = self._backward_of(peer)
        (position,) = (n for n, action in enumerate(actions) if isinstance(action, Scatter))
        place = actions[position].place  # type: ignore[union-attr]
        part = [*_leading_to(actions[:position], place), actions[position]]
        self._perform(peer, part, self._transport(peer, part, collective=collective, traffic=None))
        return taken

    def _content(self, wanted: Letter) -> tuple[Tensor, Tensor]:
        """dk and dv that a message brings: Note [What a peer sends]."""
        made: dict[Letter, list[Tensor]] = {}
        waiting = [(wanted, *self._making(wanted))]
        while waiting:
            letter, part, needs = waiting[-1]
            missing = [need for need in needs if need not in made]
            if missing:
                waiting += [(need, *self._making(need)) for need in missing]
                continue
            waiting.pop()
            arrivals = iter([made.pop(need) for need in needs])
            sent: list[Tensor] = []
            transport = self._transport(
                letter.sender,
                part,
                gradients=lambda _, tensors, some=arrivals: _fill(tensors, *next(some)),
                sent=sent,
                traffic=None,
            )
            self._perform(letter.sender, part, transport)
            made[letter] = sent
        dk, dv = made[wanted]
        return dk, dv

    def _making(self, letter: Letter) -> tuple[list[Action], list[Letter]]:
        """The sender's actions that lead to a message, the last one sends it alone; what they need.

        The messages that they need are named in the order in which they are received.
        """
        actions = self._backward_of(letter.sender)
        sends = (
            (position, send)
            for position, action in enumerate(actions)
            if isinstance(action, Post) and action.carries == "gradients"
            for send in action.sends
            if send.to == letter.receiver
        )
        position, send = next(islice(sends, letter.number, None))
        part = _leading_to(actions[:position], send.place)
        kept = {r.place for a in part if isinstance(a, Post) for r in a.receives}
        needs = [
            received
            for place, received in _letters_to(letter.sender, actions).items()
            if place in kept
        ]
        return [*part, Post(-1, "gradients", (send,), ())], needs

    def _backward_of(self, rank: int) -> list[Action]:
        if rank not in self._backward:
            self._backward[rank] = [*performed(self.program(rank).backward, in_order=False)]
        return self._backward[rank]

    def _transport(self, rank: int, actions: Sequence[Action], **options: Any) -> StandIn:
        return StandIn(
            place=Place(None, tuple(range(self.schedule.world_size)), rank),
            op="simulated",
            plan_tag=0,
            posts=iter([action for action in actions if isinstance(action, Post)]),
            batch=self.batch,
            keys=lambda receive, tensors: _fill(tensors, *self.keys(receive.rows)),
            **options,
        )

    def _perform(self, rank: int, part: Sequence[Action], transport: StandIn) -> None:
        """A part of a rank's backward pass; nothing of it stays but what the transport keeps."""
        mine = self.shares.queries(rank)
        whole = any(isinstance(action, (Gather, Scatter)) for action in part)
        # Own keys are not computed here, but tell the shapes.
        k, v = self.shares.keys(rank, None if whole else ())
        program = Program(rank, self.schedule.k_lens, (), tuple(part))
        attention_backward(
            BackwardTensors(mine.dout, None, mine.q, k, v, mine.out, mine.softmax_lse),
            exchange=Performance(program, transport),
            kernel=self.kernel,
            scores=self.scores(rank),
        )


def _letters_to(rank: int, actions: Sequence[Action]) -> dict[int, Letter]:
    """The gradients that a rank receives in a pass, in order, by the place that they come to."""
    counts: Counter[int] = Counter()
    letters = {}
    for action in actions:
        if isinstance(action, Post) and action.carries == "gradients":
            for receive in action.receives:
                sender = receive.sender
                letters[receive.place] = Letter(sender, rank, counts[sender])
                counts[sender] += 1
    return letters


def _leading_to(actions: Sequence[Action], place: int) -> list[Action]:
    """Those of the actions that make the sums of a place, in order, without what is sent."""
    sums, places, transfers = {place}, set(), set()
    kept: list[Action] = []
    for action in reversed(actions):
        match action:
            case Compute() if action.place in sums:
                places.add(action.place)
            case Add() if action.to in sums:
                places.add(action.place)
            case Join() if action.place in places:
                places.update(piece[0] for piece in action.pieces)
            case Gather() if action.place in places:
                pass
            case Post():
                receives = tuple(r for r in action.receives if r.place in places)
                if not receives:
                    continue
                transfers.add(action.transfer)
                action = action._replace(sends=(), receives=receives)
            case Wait():
                pass
            case _:
                continue
        kept.append(action)
    return [a for a in reversed(kept) if not isinstance(a, Wait) or a.transfer in transfers]


class _Collectives:
    """Gathered keys and scattered gradients of a rank, in the order of its collectives.

    A rank's part is summed over all ranks at once, in block order, as `Transport.reduce_scatter`
    does where messages have tags.
    """

    def __init__(self, rank: int, peers: Peers) -> None:
        self._rank = rank
        self._peers = peers
        self._parts: list[list[Tensor]] = []
        self._calls = 0

    def __call__(self, kind: Kind, output: Tensor, x: Tensor) -> None:
        which = self._calls % 2  # k then v, dk then dv
        self._calls += 1
        if kind == "gradient":
            self._scatter(which, output, x)
            return
        ranks = self._peers.schedule.world_size
        shards = (self._peers.shares.keys(source)[which] for source in range(ranks))
        self._gather(output, shards)

    def _gather(self, output: Tensor, shards: Iterable[Tensor]) -> None:
        lens = self._peers.schedule.k_lens
        for part, shard in zip(output.view(len(lens), -1), shards, strict=True):
            rows = part.view(shard.shape[0], max(lens), *shard.shape[2:])
            rows[:, : shard.shape[1]] = shard

    def _scatter(self, which: int, output: Tensor, x: Tensor) -> None:
        ranks = self._peers.schedule.world_size
        if not self._parts:
            shards = [self._peers.shares.keys(rank) for rank in range(ranks)]
            for distance in range(1, ranks):
                calls = cycle((0, 1))

                def gathered(kind: Kind, output: Tensor, x: Tensor, calls=calls) -> None:  # type: ignore[no-untyped-def]
                    n = next(calls)
                    self._gather(output, [shard[n] for shard in shards])

                peer = (self._rank - distance) % ranks
                self._parts.append(self._peers.scattered(peer, self._rank, gathered))
        shares = torch.empty_like(x.view(ranks, -1))
        shares[self._rank] = x.view(ranks, -1)[self._rank]
        for distance, parts in enumerate(self._parts, start=1):
            shares[(self._rank - distance) % ranks] = parts[which]
        output.copy_(shares.sum(0))


def _by_source(rows: KeyRows) -> Iterator[tuple[int, Rows]]:
    """Runs of one source that ascend, put together."""
    runs: list[tuple[int, int]] = []
    for n, (source, start, stop) in enumerate(rows):
        runs.append((start, stop))
        following = rows[n + 1] if n + 1 < len(rows) else None
        if following is None or following[0] != source or following[1] < stop:
            yield source, tuple(runs)
            runs = []


def _fill(tensors: Sequence[Tensor], k: Tensor, v: Tensor) -> None:
    """Write K and V into one message that holds both, or into one each."""
    parts: Sequence[Tensor] = tensors
    if len(tensors) == 1:
        parts = [
            part.view(x.shape)
            for part, x in zip(tensors[0].split([k.numel(), v.numel()]), (k, v), strict=True)
        ]
    for part, x in zip(parts, (k, v), strict=True):
        part.copy_(x)
