"""How keys and values travel, and how their gradients come home. Overlap lives here alone.

Three exchanges with one contract. `steps` yields keys with the tiles that read them and posts the
next transfer before it yields; a step is computed while the next one is under way. In a gradient
step the caller adds dK and dV of the step's keys to `step.dk` and `step.dv`, and the exchange
carries them to the rank that owns the rows.

Note [Memory is set by the message]
    The direct exchange cuts what a rank reads from another into messages of about so many keys,
    each with its own tiles. A message's keys, the next message's, and in the backward pass the
    gradients of the last one are alive at a time: a few messages, however many ranks there are.
    Every message costs calls and a merge of its own, so they are longer in the forward pass, which
    has far less alive beside them than the backward pass. The number of parts follows the longest
    shard, so halves and wholes stay in step, and is a power of two, so that messages end where
    zigzag chunks end: a tile cut elsewhere costs two more calls. A pair that needs so few rows that
    its messages would be shorter than an eighth of the usual has fewer of them.

Note [One order of messages]
    NCCL matches messages by the order of posts (Note [Messages under NCCL] in transport.py), so
    every rank goes through one sequence: in the backward pass keys 1, keys 2, gradients 1, keys 3,
    gradients 2, ... A rank leaves out the rounds in which it has nothing to send or receive. Where
    it leaves out the next one, the gradients of this one come before the keys of a later one: these
    are then posted after the computation, not before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nnscaler_ring.core.coordinates import KeyRows
from nnscaler_ring.core.online_softmax import accumulation_dtype
from nnscaler_ring.core.row_sum import RowSum
from nnscaler_ring.core.schedule import PairWork, Rows, Schedule, Step, row_count
from nnscaler_ring.core.tile import Tile
from nnscaler_ring.core.transport import Kind, Message, Transfer, Transport

FORWARD_KEYS, BACKWARD_KEYS = 8192, 2048
"""Tokens of the longest shard per message; see Note [Memory is set by the message]."""

SHORTEST = 8
"""The part of that below which messages are not cut."""

KEPT_ROUNDS = 4096
"""So many messages of a pass are planned once; more, of very long shards, anew in every pass."""


class Keys(NamedTuple):
    """Keys and values [batch, keys, num_kv_heads, head_dim], and the tiles that read them.

    `rows` says whose they are: (source, start, stop) of the source's shard, one after another.
    """

    k: Tensor
    v: Tensor
    tiles: Sequence[Tile]
    rows: KeyRows


class GradientStep(NamedTuple):
    """The same in the backward pass, with the sums that take the gradients of these keys."""

    k: Tensor
    v: Tensor
    tiles: Sequence[Tile]
    rows: KeyRows
    dk: RowSum
    dv: RowSum


class Sent(NamedTuple):
    """What one rank sends in one call, in units of rows: a row of K together with its row of V.

    `summed_gradient_rows` travel in the accumulation dtype, the others in the dtype of the input.
    """

    kv_rows: int
    gradient_rows: int
    summed_gradient_rows: int


class KVExchange(Protocol):
    """One rank's part of an exchange, for one call."""

    def steps(self, k: Tensor, v: Tensor) -> Iterator[Keys]:
        """The steps of a forward pass; k and v are this rank's rows."""
        ...

    def gradient_steps(self, k: Tensor, v: Tensor) -> Iterator[GradientStep]:
        """The steps of a backward pass."""
        ...

    def gradients(self) -> tuple[Tensor, Tensor]:
        """(dk, dv) of this rank's rows, once `gradient_steps` is exhausted."""
        ...


class ExchangePlan(Protocol):
    """An exchange before the call: a pure function of the schedule and the rank."""

    def start(self, transport: Transport) -> KVExchange:
        """The exchange for one call."""
        ...

    def sent(self) -> Sent:
        """What this rank will send: the prediction that the counted bytes must meet."""
        ...


class _Home:
    """Sums of dK and dV for the rows that this rank owns."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.dk, self.dv = RowSum(k), RowSum(v)

    def add_(self, rows: Rows, dk: Tensor, dv: Tensor) -> None:
        """Add gradients of runs of rows that lie one after another in dk and dv."""
        offset = 0
        for start, stop in rows:
            piece = slice(offset, offset + stop - start)
            self.dk.add_(slice(start, stop), dk[:, piece])
            self.dv.add_(slice(start, stop), dv[:, piece])
            offset += stop - start

    def step(self, keys: Keys) -> GradientStep:
        """The local step: its gradients are at home already."""
        return GradientStep(*keys, self.dk, self.dv)


@dataclass(frozen=True)
class Round:
    """One message in and one out: the step it brings, and the step it makes possible elsewhere.

    `number`: its place in the sequence of rounds, which all ranks share.
    """

    number: int
    incoming: Step
    target: int
    outgoing: Step


@dataclass(frozen=True)
class Distance:
    """A rank and the two that are so many ranks from it: one that it reads, one that reads it."""

    distance: int
    incoming: PairWork
    target: int
    outgoing: PairWork

    @classmethod
    def of(cls, schedule: Schedule, rank: int, distance: int) -> Distance:
        """From the schedule."""
        ranks = schedule.world_size
        source, target = (rank - distance) % ranks, (rank + distance) % ranks
        incoming = PairWork.of(schedule, rank, source)
        return cls(distance, incoming, target, PairWork.of(schedule, target, rank))

    def parts(self, longest: int, keys: int) -> tuple[int, int]:
        """How many messages come in and go out, of about `keys` tokens of the longest shard."""
        incoming, outgoing = (row_count(pair.rows) for pair in (self.incoming, self.outgoing))
        return message_count(incoming, longest, keys), message_count(outgoing, longest, keys)

    def rounds(
        self, longest: int, keys: int, chosen: Iterable[int] | None = None
    ) -> Iterator[Round]:
        """These messages, or those of them whose numbers, from 0, are `chosen`.

        The side that has fewer ends with empty ones; what is empty on both is left out.
        """
        parts_in, parts_out = self.parts(longest, keys)
        first = self.distance * _most_messages(longest, keys)
        for number in range(max(parts_in, parts_out)) if chosen is None else chosen:
            incoming = self.incoming.step(number, parts_in)
            outgoing = self.outgoing.step(number, parts_out)
            if incoming.rows or outgoing.rows:
                yield Round(first + number, incoming, self.target, outgoing)


def message_count(rows: int, longest: int, keys: int) -> int:
    """In how many messages a pair's rows travel: Note [Memory is set by the message]."""
    shortest = max(1, keys // SHORTEST)
    return min(_most_messages(longest, keys), _power_of_two(-(-rows // shortest)))


def _most_messages(longest: int, keys: int) -> int:
    return _power_of_two(longest // keys)


class Rounds:
    """The messages of one pass in order, the nearest distance first.

    A shard of millions of tokens has so many that they would take more time and memory than all
    else of the plan: then they are made when they are asked for. See `KEPT_ROUNDS`.
    """

    def __init__(self, distances: Sequence[Distance], longest: int, keys: int) -> None:
        self._distances = distances
        self._longest = longest
        self._keys = keys
        most = sum(max(some.parts(longest, keys)) for some in distances)
        self._kept = tuple(self._made()) if most <= KEPT_ROUNDS else None

    def __iter__(self) -> Iterator[Round]:
        return self._made() if self._kept is None else iter(self._kept)

    def _made(self) -> Iterator[Round]:
        for some in self._distances:
            yield from some.rounds(self._longest, self._keys)


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
        self._home = _Home(k, v)
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
            early = kind == "forward_kv" or (following and following.number == round_.number + 1)
            under_way = self._post(kind, following, k, v) if following and early else None
            incoming = round_.incoming
            rows = [(incoming.source, *run) for run in incoming.rows]
            yield Keys(buffer.k, buffer.v, incoming.tiles, rows), round_

    def _post(self, kind: Kind, round_: Round, k: Tensor, v: Tensor) -> tuple[Transfer, _Buffer]:
        incoming, outgoing = round_.incoming, round_.outgoing
        buffer = _Buffer(k, v, row_count(incoming.rows), k.dtype)
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
        returning = _Buffer(k, v, rows, _gradient_dtype(round_.outgoing, k.dtype))
        receives = returning.messages(round_.target, apart=True)
        transfer = self._transport.post("gradient", sends, receives)
        return _Homebound(transfer, round_.outgoing.rows, returning)


class _Homebound(NamedTuple):
    """Gradients under way to and from this rank."""

    transfer: Transfer
    rows: Rows
    returning: _Buffer

    def settle(self, home: _Home) -> None:
        """Wait for them and add those that came home."""
        self.transfer.wait()
        home.add_(self.rows, self.returning.k, self.returning.v)


class _Buffer:
    """Memory for some rows of K and V in one piece, so that one message can fill it."""

    def __init__(self, k: Tensor, v: Tensor, rows: int, dtype: torch.dtype) -> None:
        shapes = [(x.shape[0], rows, *x.shape[2:]) for x in (k, v)]
        sizes = [torch.Size(shape).numel() for shape in shapes]
        self._whole = k.new_empty(sum(sizes), dtype=dtype)
        parts = self._whole.split(sizes)
        self.k, self.v = (x.view(shape) for x, shape in zip(parts, shapes, strict=True))

    def messages(self, block: int, apart: bool) -> list[Message]:
        """To fill it from, or send it to, a block: K and V apart, or both as one message."""
        tensors = (self.k, self.v) if apart else (self._whole,)
        return [Message(block, tensor) for tensor in tensors]


def _outgoing_messages(target: int, step: Step, k: Tensor, v: Tensor) -> list[Message]:
    """K and V of a step's rows: apart where that saves a copy, else packed into one message."""
    if step.is_one_piece(k.shape[0]):
        rows = slice(*step.rows[0])
        return [Message(target, x[:, rows].contiguous()) for x in (k, v)]
    buffer = _Buffer(k, v, row_count(step.rows), k.dtype)
    offset = 0
    for start, stop in step.rows:
        piece = slice(offset, offset + stop - start)
        buffer.k[:, piece] = k[:, start:stop]
        buffer.v[:, piece] = v[:, start:stop]
        offset += stop - start
    return buffer.messages(target, apart=False)


def _power_of_two(number: int) -> int:
    """The largest that is not above `number`, at least 1."""
    return 1 << max(0, number.bit_length() - 1)


def _gradient_dtype(step: Step, dtype: torch.dtype) -> torch.dtype:
    return accumulation_dtype(dtype) if step.summed else dtype


class RingPlan:
    """Neighbour to neighbour: every shard of K and V travels the whole ring, its gradient after it.

    For fabrics where only neighbour links are fast. Bytes: (ranks - 1) shards each way, whatever
    the mask. Memory: O(tokens / ranks), two shards of K and V and two of their gradients.

    Source: Liu et al., "Ring Attention with Blockwise Transformers", arXiv 2310.01889.
    """

    def __init__(self, schedule: Schedule, rank: int) -> None:
        ranks = schedule.world_size
        self.sources = [(rank - distance) % ranks for distance in range(ranks)]
        self.tiles = [tuple(schedule.tiles(rank, (source,))) for source in self.sources]
        self.k_lens = schedule.k_lens

    def start(self, transport: Transport) -> KVExchange:
        return _Ring(self, transport)

    def sent(self) -> Sent:
        return Sent(
            sum(self.k_lens[source] for source in self.sources[:-1]),
            0,
            sum(self.k_lens[source] for source in self.sources[1:]),
        )


class _Ring:
    def __init__(self, plan: RingPlan, transport: Transport) -> None:
        self._plan = plan
        self._transport = transport
        place = transport.place
        self._right = (place.block + 1) % place.world_size
        self._left = (place.block - 1) % place.world_size

    def steps(self, k: Tensor, v: Tensor) -> Iterator[Keys]:
        return self._arrivals("forward_kv", k, v)

    def gradient_steps(self, k: Tensor, v: Tensor) -> Iterator[GradientStep]:
        self._home = _Home(k, v)
        dtype = accumulation_dtype(k.dtype)
        sources, k_lens = self._plan.sources, self._plan.k_lens
        under_way: _SumsUnderWay | None = None
        for distance, keys in enumerate(self._arrivals("backward_kv", k, v)):
            if distance == 0:
                yield self._home.step(keys)
                continue
            step = GradientStep(*keys, RowSum(keys.k), RowSum(keys.v))
            yield step
            if under_way:
                under_way.settle(step.dk, step.dv)
                under_way = None  # its memory is needed for the next one
            # The sum for the keys that come next, of the ranks that have had them; at last, home.
            following = sources[(distance + 1) % len(sources)]
            so_far = _Buffer(k, v, k_lens[following], dtype)
            sums = [total.current().to(dtype).contiguous() for total in (step.dk, step.dv)]
            sends = [Message(self._right, total) for total in sums]
            transfer = self._transport.post("gradient", sends, so_far.messages(self._left, True))
            under_way = _SumsUnderWay(transfer, so_far)
            del so_far, step, keys
        if under_way:
            under_way.settle(self._home.dk, self._home.dv)

    def gradients(self) -> tuple[Tensor, Tensor]:
        return self._home.dk.current(), self._home.dv.current()

    def _arrivals(self, kind: Kind, k: Tensor, v: Tensor) -> Iterator[Keys]:
        """Every shard, from the own one leftwards, each yielded while the next is under way."""
        held = k.contiguous(), v.contiguous()
        for distance, tiles in enumerate(self._plan.tiles):
            following = self._plan.sources[distance + 1 : distance + 2]
            buffer = _Buffer(k, v, sum(self._plan.k_lens[source] for source in following), k.dtype)
            sends = [Message(self._right, x) for x in held] if following else []
            transfer = self._transport.post(kind, sends, buffer.messages(self._left, True))
            source = self._plan.sources[distance]
            yield Keys(*held, tiles, ((source, 0, self._plan.k_lens[source]),))
            transfer.wait()
            held = buffer.k, buffer.v


class _SumsUnderWay(NamedTuple):
    """Sums of gradients under way along the ring."""

    transfer: Transfer
    arriving: _Buffer

    def settle(self, dk: RowSum, dv: RowSum) -> None:
        """Wait for them and add those that arrived."""
        self.transfer.wait()
        dk.add_(slice(None), self.arriving.k)
        dv.add_(slice(None), self.arriving.v)


class AllGatherPlan:
    """Gather all keys and values, compute once, reduce-scatter the gradients.

    The fewest messages. Bytes: (ranks - 1) shards each way (of the longest length), whatever the
    mask. Memory: O(tokens) per rank, which the other two exchanges avoid.

    Source: Llama 3 report, arXiv 2407.21783, section 3.3.2.
    """

    def __init__(self, schedule: Schedule, rank: int) -> None:
        self.tiles = tuple(schedule.tiles(rank, range(schedule.world_size)))
        self.k_lens = schedule.k_lens
        self.rows = tuple((source, 0, n) for source, n in enumerate(self.k_lens))
        self.rank = rank

    def start(self, transport: Transport) -> KVExchange:
        return _AllGather(self, transport)

    def sent(self) -> Sent:
        rows = (len(self.k_lens) - 1) * max(self.k_lens)
        return Sent(rows, 0, rows)


class _AllGather:
    def __init__(self, plan: AllGatherPlan, transport: Transport) -> None:
        self._plan = plan
        self._transport = transport

    def steps(self, k: Tensor, v: Tensor) -> Iterator[Keys]:
        yield self._keys("forward_kv", k, v)

    def gradient_steps(self, k: Tensor, v: Tensor) -> Iterator[GradientStep]:
        keys = self._keys("backward_kv", k, v)
        step = GradientStep(*keys, RowSum(keys.k), RowSum(keys.v))
        yield step
        self._dk, self._dv = self._scatter(step.dk), self._scatter(step.dv)

    def gradients(self) -> tuple[Tensor, Tensor]:
        return self._dk, self._dv

    def _keys(self, kind: Kind, k: Tensor, v: Tensor) -> Keys:
        plan = self._plan
        return Keys(self._gather(kind, k), self._gather(kind, v), plan.tiles, plan.rows)

    def _gather(self, kind: Kind, x: Tensor) -> Tensor:
        lens = self._plan.k_lens
        if len(lens) == 1:
            return x
        padded = x.new_zeros(x.shape[0], max(lens), *x.shape[2:])
        padded[:, : x.shape[1]] = x
        gathered = self._transport.all_gather(kind, padded)
        if x.shape[0] == 1 and min(lens) == max(lens):
            return gathered.view(1, -1, *x.shape[2:])
        return torch.cat([shard[:, :n] for shard, n in zip(gathered, lens, strict=True)], dim=1)

    def _scatter(self, total: RowSum) -> Tensor:
        lens = self._plan.k_lens
        sums = total.current()
        if len(lens) == 1:
            return sums
        batch, _, *rest = sums.shape
        padded = sums.new_zeros(
            len(lens), batch, max(lens), *rest, dtype=accumulation_dtype(sums.dtype)
        )
        for shard, rows in zip(padded, sums.split(lens, dim=1), strict=True):
            shard[:, : rows.shape[1]] = rows
        return self._transport.reduce_scatter("gradient", padded)[:, : lens[self._plan.rank]]


EXCHANGES: dict[str, type[DirectPlan] | type[RingPlan] | type[AllGatherPlan]] = {
    "direct": DirectPlan,
    "ring": RingPlan,
    "all_gather": AllGatherPlan,
}
"""Exchanges by name. A new one is a plan class with `start` and `sent`, listed here."""
