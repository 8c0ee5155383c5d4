"""Messages between the blocks of a group: posted together, waited for later, counted, named.

The only file that sends anything. A transfer that fails raises an error that names the op, the
direction and the peer, because gloo names an address at best.

Note [Messages under NCCL]
    NCCL runs on a stream of its own: what is posted starts when the work queued so far is done, and
    runs beside what is queued after it. `Transfer.wait` makes the current stream wait, not the
    host. Until then the transfer holds its tensors; after it their memory may be reused in the
    order of the current stream, so that the caching allocator hands the same buffers out again.

    NCCL has no tags. Two ranks match their messages by the order in which each posts them, and a
    group of messages starts when the one before it is done. So all ranks post in one common order:
    every rank skips the same way through the same sequence (see Note [One order of messages] in
    exchange/direct.py), and what one rank sends in a post, its peer receives in the same post.

    NCCL connects the ranks in a group's first call, in which all must take part: `connect`.

Note [Words beside the data]
    Gloo's messages have tags, and the tag says to which pass a message belongs: one of another pass
    is never taken. So over gloo everything is a message, also what is gathered. Elsewhere, the
    first message from each peer in a pass, and the first collective, are accompanied by a word, the
    chain of the pass (Note [One history] in calls.py). It is compared when the data have arrived;
    for a GPU that is when the stream has come there, so the host finds a difference a little later:
    in its next pass, or when the watch looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler_ring.core.ranks.calls import ALONE_PASS, Pass
from nnscaler_ring.core.ranks.groups import ALONE, Place, Traffic, group_of, group_state
from nnscaler_ring.core.ranks.staging import backends_of, carriage_of
from nnscaler_ring.core.ranks.words import Message, Words

Kind = Literal["forward_kv", "backward_kv", "gradient", "relayout", "seed", "partial"]
__all__ = ["Kind", "Message", "Transfer", "Transport", "connect"]

KINDS: tuple[Kind, ...] = (
    *("forward_kv", "backward_kv", "gradient", "relayout", "seed", "partial"),
)


# torch 2.13 renamed both; the old names warn there.
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Sent(NamedTuple):
    """A message under way: what it is, for people, and the global ranks of its peers."""

    work: dist.Work
    what: str
    peers: Sequence[int]


class Transfer:
    """Messages under way. Their tensors must live, unchanged, until `wait` returns.

    `arrived` is called when everything is there. `entered`: the pass that they belong to.
    """

    def __init__(
        self,
        works: Sequence[Sent],
        tensors: Sequence[Tensor],
        arrived: Callable[[], None] | None = None,
        entered: Pass = ALONE_PASS,
    ) -> None:
        self._works = works
        self._tensors = tensors
        self._arrived = arrived
        self._entered = entered

    def wait(self) -> None:
        """Return when all messages have left and arrived, or the current stream waits for that.

        Raises:
            RuntimeError: a peer is lost, or silent for longer than the group's timeout, or the
                ranks are out of step.
            ValueError: the ranks' arguments differ, or a rank refused its own.
        """
        entered = self._entered
        for work, what, peers in self._works:
            entered.waits_for = what
            try:
                work.wait()
            except RuntimeError as error:
                raise _failed(entered, what, peers, error) from error
        if self._works:
            entered.waits_for = ""
        if self._arrived:
            self._arrived()
        self._works, self._tensors, self._arrived = (), (), None


def _failed(entered: Pass, what: str, peers: Sequence[int], error: RuntimeError) -> Exception:
    if entered.watch is None:
        return RuntimeError(f"{what} failed: {error}")
    return entered.watch.transfer_failed(entered, what, peers, error)


def connect(group: str, device: torch.device) -> None:
    """Ready a group for messages between tensors of a device; all its ranks take part.

    Costs a collective where NCCL is used for the first time, else a lookup.

    Raises:
        ValueError: the group has no backend for the device.
    """
    if group == ALONE:
        return
    state = group_state(group)
    if device.type in state.connected:
        return
    process_group = group_of(group)
    carriage_of(process_group, device)
    if backends_of(process_group).get(device.type) == "nccl":
        dist.all_reduce(torch.zeros(1, device=device), group=process_group)
    state.connected.add(device.type)


@dataclass(frozen=True)
class Transport:
    """Sends between the blocks of one op call.

    Args:
        place: this rank's place in the group.
        traffic: where to count the payload; None for a call alone.
        op: the public function and the pass, for messages.
        plan_tag: the same number on all ranks in the same pass. It is part of the tag of every
            message, so that ranks in different passes never take each other's messages.
        entered: the pass, where it is counted.
    """

    place: Place
    traffic: Traffic | None
    op: str
    plan_tag: int
    entered: Pass = field(default=ALONE_PASS, kw_only=True)

    @cached_property
    def _words(self) -> Words | None:
        """What travels beside the data where there are no tags: Note [Words beside the data]."""
        if self.entered.watch is None or not self.in_order:
            return None
        members = [self.place.global_rank(block) for block in range(self.place.world_size)]
        return Words(self.entered, members)

    @property
    def in_order(self) -> bool:
        """Whether ranks match messages by their order alone: Note [Messages under NCCL]."""
        group = self.place.group
        return group is not None and set(backends_of(group).values()) != {"gloo"}

    def post(self, kind: Kind, sends: Sequence[Message], receives: Sequence[Message]) -> Transfer:
        """Start messages; empty ones are not sent, on either side."""
        sends, receives = (
            [message for message in messages if message.tensor.numel()]
            for messages in (sends, receives)
        )
        self._count(kind, sends)
        if not sends and not receives:
            return Transfer((), ())
        assert self.place.group is not None, self.place
        device = (*sends, *receives)[0].tensor.device
        carriage = carriage_of(self.place.group, device)
        check = None
        if self._words is not None:
            before_sends, before_receives, check = self._words.beside(sends, receives, device)
            sends, receives = [*before_sends, *sends], [*before_receives, *receives]
        arriving = [message.tensor for message in receives]
        outgoing = carriage.outgoing([message.tensor for message in sends])
        incoming = carriage.incoming(arriving)
        tag = self.plan_tag % (1 << 28) * len(KINDS) + KINDS.index(kind)
        operations: list[dist.P2POp] = []
        named: list[tuple[str, int]] = []
        for call, direction, messages, tensors in (
            (dist.isend, "sending to", sends, outgoing),
            (dist.irecv, "receiving from", receives, incoming),
        ):
            for (block, _), tensor in zip(messages, tensors, strict=True):
                peer = self.place.members[block]
                operations.append(
                    dist.P2POp(call, tensor, group=self.place.group, group_peer=peer, tag=tag)
                )
                rank = self.place.global_rank(block)
                named.append((f"{self.op}: {direction} rank {rank} ({kind})", rank))
        whats = (what.removeprefix(f"{self.op}: ") for what, _ in named)
        together = f"{self.op}: {'; '.join(dict.fromkeys(whats))}"
        peers = list(dict.fromkeys(rank for _, rank in named))
        try:
            works = dist.batch_isend_irecv(operations)
        except RuntimeError as error:
            raise _failed(self.entered, together, peers, error) from error
        if len(works) == len(named):
            under_way = [
                Sent(work, what, (rank,)) for work, (what, rank) in zip(works, named, strict=True)
            ]
        else:  # NCCL returns one work for the whole batch
            under_way = [Sent(work, together, peers) for work in works]

        def arrived() -> None:
            carriage.arrived(arriving, incoming)
            if check is not None:
                check()

        return Transfer(under_way, [*outgoing, *incoming, *arriving], arrived, self.entered)

    @property
    def _has_tags(self) -> bool:
        return self.place.group is not None and not self.in_order

    def all_gather(self, kind: Kind, x: Tensor) -> Tensor:
        """[world_size, *x.shape]: every block's x, all of one shape, in block order."""
        gathered = x.new_empty((self.place.world_size, *x.shape))
        if self._has_tags:
            x = x.contiguous()
            sends = [Message(block, x) for block in self._others()]
            receives = [Message(block, gathered[block]) for block in self._others()]
            transfer = self.post(kind, sends, receives)
            gathered[self.place.block] = x
            transfer.wait()
            return gathered
        self._run(kind, ALL_GATHER, gathered.view(-1), x.reshape(-1))
        self._count_collective(kind, x)
        return self._in_block_order(gathered)

    def reduce_scatter(self, kind: Kind, x: Tensor) -> Tensor:
        """The sum over ranks of this rank's block of x [world_size, ...], in x's dtype."""
        if self._has_tags:
            shares = torch.empty_like(x)
            sends = [Message(block, x[block].contiguous()) for block in self._others()]
            receives = [Message(block, shares[block]) for block in self._others()]
            transfer = self.post(kind, sends, receives)
            shares[self.place.block] = x[self.place.block]
            transfer.wait()
            return shares.sum(0)
        in_group_order = torch.empty_like(x)
        # Not by a list of indices, which the host would wait to copy to the device.
        for member, share in zip(self.place.members, x, strict=True):
            in_group_order[member] = share
        mine = x.new_empty(x.shape[1:])
        self._run(kind, REDUCE_SCATTER, mine.view(-1), in_group_order.view(-1))
        self._count_collective(kind, mine)
        return mine

    def _others(self) -> Iterator[int]:
        """The other blocks, from the next one on: as a permutation at each distance."""
        blocks, me = self.place.world_size, self.place.block
        return ((me + distance) % blocks for distance in range(1, blocks))

    def _in_block_order(self, gathered: Tensor) -> Tensor:
        members = self.place.members
        if members == tuple(range(len(members))):
            return gathered
        return torch.stack([gathered[member] for member in members])

    def _run(self, kind: Kind, collective, output: Tensor, x: Tensor) -> None:  # type: ignore[no-untyped-def]
        if x.numel() == 0:
            return
        assert self.place.group is not None, self.place
        carriage = carriage_of(self.place.group, x.device)
        outgoing, incoming = carriage.outgoing([x]), carriage.incoming([output])
        ranks = [self.place.global_rank(block) for block in range(self.place.world_size)]
        what = f"{self.op}: {kind} collective of ranks {ranks}"
        self.entered.waits_for = what
        try:
            if self._words is not None and (words := self._words.to_gather(x.device)):
                ALL_GATHER(*words, group=self.place.group)
            collective(*incoming, *outgoing, group=self.place.group)
        except RuntimeError as error:
            peers = [rank for block, rank in enumerate(ranks) if block != self.place.block]
            raise _failed(self.entered, what, peers, error) from error
        self.entered.waits_for = ""
        if self._words is not None:
            self._words.check_gathered()
        carriage.arrived([output], incoming)

    def _count(self, kind: Kind, sends: Sequence[Message]) -> None:
        if self.traffic is None:
            return
        name = f"{kind}_bytes"
        sent = sum(message.tensor.nbytes for message in sends)
        setattr(self.traffic, name, getattr(self.traffic, name) + sent)
        self.traffic.messages += sum(message.tensor.numel() > 0 for message in sends)

    def _count_collective(self, kind: Kind, share: Tensor) -> None:
        self._count(kind, [Message(block, share) for block in self._others()])
