"""Performs a program over a transport: the one place where keys and gradients really move.

The actions say what is posted, waited for and computed, in which order; here are the tensors. A
tensor lives exactly as long as its place (Note [Places] in program.py) or its transfer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nnscaler_ring.core.exchange.contract import GradientStep, Keys
from nnscaler_ring.core.exchange.program import (
    OWN,
    Action,
    Add,
    Compute,
    Free,
    Gather,
    Join,
    Post,
    Program,
    Receive,
    Scatter,
    Send,
    Wait,
    travels_apart,
)
from nnscaler_ring.core.plan.schedule import Rows
from nnscaler_ring.core.ranks.transport import Kind, Message, Transfer, Transport
from nnscaler_ring.core.sums.online_softmax import accumulation_dtype
from nnscaler_ring.core.sums.row_sum import RowSum


class Performance:
    """One rank's part of an exchange for one call: a `KVExchange`, see contract.py."""

    def __init__(self, program: Program, transport: Transport) -> None:
        self._program = program
        self._transport = transport

    def steps(self, k: Tensor, v: Tensor) -> Iterator[Keys]:
        """Perform the forward pass, with a stop at every `Compute`."""
        memory = _Memory(self._program, self._transport, "forward_kv", k, v)
        for action in self._program.forward:
            if isinstance(action, Compute):
                yield memory.keys(action)
            else:
                memory.perform(action)

    def gradient_steps(self, k: Tensor, v: Tensor) -> Iterator[GradientStep]:
        """Perform the backward pass, with a stop at every `Compute`."""
        memory = _Memory(self._program, self._transport, "backward_kv", k, v)
        self._home = memory.sums[OWN] = RowSum(k), RowSum(v)
        for action in self._program.backward:
            if isinstance(action, Compute):
                yield from memory.gradient_step(action)
            else:
                memory.perform(action)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """(dk, dv) of the own rows, once `gradient_steps` is exhausted."""
        dk, dv = self._home
        return dk.current(), dv.current()


class _Memory:
    """The tensors of one pass, by the numbers that the actions call them by."""

    def __init__(
        self, program: Program, transport: Transport, kind: Kind, k: Tensor, v: Tensor
    ) -> None:
        self._program = program
        self._transport = transport
        self._kind: Kind = kind
        self._like = k, v
        self.places: dict[int, tuple[Tensor, Tensor]] = {OWN: (k, v)}
        self.sums: dict[int, tuple[RowSum, RowSum]] = {}
        self._transfers: dict[int, Transfer] = {}

    def perform(self, action: Action) -> None:
        """Do everything but compute."""
        match action:
            case Post():
                if action.only is None or (action.only == "order") == self._transport.in_order:
                    self._post(action)
            case Wait():
                self._transfers.pop(action.transfer).wait()
            case Free():
                del self.places[action.place]
            case Add():
                self._add(action)
            case Join():
                self._join(action)
            case Gather():
                self.places[action.place] = self._gathered(0), self._gathered(1)
            case Scatter():
                self._scatter(action)
            case Compute():
                raise AssertionError(action)  # the two passes stop for it

    def keys(self, action: Compute) -> Keys:
        k, v = self.places[action.place]
        if action.taken is not None:
            k, v = _taken(k, action), _taken(v, action)
        return Keys(k, v, action.tiles, action.rows)

    def gradient_step(self, action: Compute) -> Iterator[GradientStep]:
        """The one step of an action, and what its gradients go into."""
        keys = self.keys(action)
        if action.place not in self.sums:
            k, v = self.places[action.place]
            self.sums[action.place] = RowSum(k), RowSum(v)
        if action.taken is None:
            yield GradientStep(*keys, *self.sums[action.place])
            return
        parts = RowSum(keys.k), RowSum(keys.v)
        yield GradientStep(*keys, *parts)
        for total, part in zip(self.sums[action.place], parts, strict=True):
            _give_back(total, part.current(), action)

    # Messages.

    def _post(self, action: Post) -> None:
        keys = action.carries == "keys"
        outgoing = self._outgoing_keys if keys else self._outgoing_gradients
        sends = [message for send in action.sends for message in outgoing(send)]
        if not keys:  # from now on they belong to the messages
            for place in {send.place for send in action.sends}:
                del self.sums[place]
        receives = [m for receive in action.receives for m in self._incoming(receive, keys)]
        kind: Kind = self._kind if keys else "gradient"
        self._transfers[action.transfer] = self._transport.post(kind, sends, receives)

    def _outgoing_keys(self, send: Send) -> list[Message]:
        k, v = self.places[send.place]
        if travels_apart(len(send.rows), send.whole, k.shape[0]):
            if not send.whole:
                rows = slice(*send.rows[0])
                k, v = k[:, rows], v[:, rows]
            return [Message(send.to, k.contiguous()), Message(send.to, v.contiguous())]
        whole, pk, pv = _in_one_piece(k, v, send.length, k.dtype)
        _copy_rows(pk, k, send.rows)
        _copy_rows(pv, v, send.rows)
        return [Message(send.to, whole)]

    def _outgoing_gradients(self, send: Send) -> list[Message]:
        dtype = self._gradient_dtype(send.wide)
        messages = []
        for total in self.sums[send.place]:
            rows = total.current()
            if not send.whole:
                rows = torch.cat([rows[:, start:stop] for start, stop in send.rows], dim=1)
            messages.append(Message(send.to, rows.to(dtype).contiguous()))
        return messages

    def _incoming(self, receive: Receive, keys: bool) -> list[Message]:
        k, v = self._like
        dtype = k.dtype if keys else self._gradient_dtype(receive.wide)
        whole, pk, pv = _in_one_piece(k, v, receive.length, dtype)
        self.places[receive.place] = pk, pv
        if keys and not travels_apart(len(receive.rows), receive.whole, k.shape[0]):
            return [Message(receive.sender, whole)]
        return [Message(receive.sender, pk), Message(receive.sender, pv)]

    def _gradient_dtype(self, wide: bool) -> torch.dtype:
        dtype = self._like[0].dtype
        return accumulation_dtype(dtype) if wide else dtype

    # Places and sums.

    def _add(self, action: Add) -> None:
        for total, arrived in zip(self.sums[action.to], self.places.pop(action.place), strict=True):
            offset = 0
            for start, stop in action.rows:
                total.add_(slice(start, stop), arrived[:, offset : offset + stop - start])
                offset += stop - start

    def _join(self, action: Join) -> None:
        k, v = (
            torch.cat([self.places[p][n][:, start:stop] for p, start, stop in action.pieces], dim=1)
            for n in (0, 1)
        )
        self.places[action.place] = k, v

    def _gathered(self, which: int) -> Tensor:
        x, lens = self._like[which], self._program.k_lens
        padded = x.new_zeros(x.shape[0], max(lens), *x.shape[2:])
        padded[:, : x.shape[1]] = x
        gathered = self._transport.all_gather(self._kind, padded)
        if x.shape[0] == 1 and min(lens) == max(lens):
            return gathered.view(1, -1, *x.shape[2:])
        return torch.cat([shard[:, :n] for shard, n in zip(gathered, lens, strict=True)], dim=1)

    def _scatter(self, action: Scatter) -> None:
        mine = slice(0, self._program.k_lens[self._program.rank])
        scattered = [self._scattered(total) for total in self.sums[action.place]]
        del self.sums[action.place]
        for total, part in zip(self.sums[OWN], scattered, strict=True):
            total.take_(mine, part[:, mine])

    def _scattered(self, total: RowSum) -> Tensor:
        lens, sums = self._program.k_lens, total.current()
        batch, _, *rest = sums.shape
        padded = sums.new_zeros(
            len(lens), batch, max(lens), *rest, dtype=accumulation_dtype(sums.dtype)
        )
        for shard, rows in zip(padded, sums.split(lens, dim=1), strict=True):
            shard[:, : rows.shape[1]] = rows
        return self._transport.reduce_scatter("gradient", padded)


def _in_one_piece(
    k: Tensor, v: Tensor, rows: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for rows of K and V that one message can fill, and its parts for K and for V."""
    shapes = [torch.Size((x.shape[0], rows, *x.shape[2:])) for x in (k, v)]
    sizes = [shape.numel() for shape in shapes]
    whole = k.new_empty(sum(sizes), dtype=dtype)
    pk, pv = (x.view(shape) for x, shape in zip(whole.split(sizes), shapes, strict=True))
    return whole, pk, pv


def _copy_rows(target: Tensor, x: Tensor, rows: Rows) -> None:
    offset = 0
    for start, stop in rows:
        target[:, offset : offset + stop - start] = x[:, start:stop]
        offset += stop - start


def _taken(x: Tensor, action: Compute) -> Tensor:
    assert action.taken is not None, action
    return torch.cat([x[:, :0], *(x[:, slice(*rows)] for rows in action.taken)], dim=1)


def _give_back(total: RowSum, sums: Tensor, action: Compute) -> None:
    """Add the gradients of what was taken to those of the place."""
    assert action.taken is not None, action
    offset = 0
    for rows in action.taken:
        length = len(range(*rows))
        total.add_(slice(*rows), sums[:, offset : offset + length])
        offset += length
