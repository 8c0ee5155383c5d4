"""Messages between the blocks of a group: posted together, waited for later, counted, named.

The only file that sends anything. A transfer that fails raises an error that names the op, the
direction and the peer, because gloo names an address at best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler_ring.core.groups import Place, Traffic

Kind = Literal["forward_kv", "backward_kv", "gradient", "relayout", "seed"]
KINDS: tuple[Kind, ...] = ("forward_kv", "backward_kv", "gradient", "relayout", "seed")


# torch 2.13 renamed both; the old names warn there.
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Message(NamedTuple):
    """A contiguous tensor to send to, or to receive from, the rank that holds `block`."""

    block: int
    tensor: Tensor


class Transfer:
    """Messages under way. Their tensors must live, unchanged, until `wait` returns."""

    def __init__(self, works: list[tuple[dist.Work, str]], tensors: list[Tensor]) -> None:
        self._works = works
        self._tensors = tensors

    def wait(self) -> None:
        """Return when all messages have left and arrived.

        Raises:
            RuntimeError: a peer is lost or silent for longer than the group's timeout.
        """
        for work, what in self._works:
            try:
                work.wait()
            except RuntimeError as error:
                raise RuntimeError(f"{what} failed: {error}") from error
        self._works, self._tensors = [], []


@dataclass(frozen=True)
class Transport:
    """Sends between the blocks of one op call.

    Args:
        place: this rank's place in the group.
        traffic: where to count the payload; None for a call alone.
        op: the public function and the pass, for messages.
        plan_tag: the same number on all ranks that follow the same plan. It is part of the tag of
            every message, so ranks that follow different plans never take each other's messages.
    """

    place: Place
    traffic: Traffic | None
    op: str
    plan_tag: int

    def post(self, kind: Kind, sends: Sequence[Message], receives: Sequence[Message]) -> Transfer:
        """Start messages; empty ones are not sent, on either side."""
        operations: list[dist.P2POp] = []
        whats: list[str] = []
        tag = self.plan_tag % (1 << 28) * len(KINDS) + KINDS.index(kind)
        for call, messages in ((dist.isend, sends), (dist.irecv, receives)):
            for block, tensor in messages:
                if tensor.numel() == 0:
                    continue
                peer = self.place.members[block]
                operations.append(
                    dist.P2POp(call, tensor, group=self.place.group, group_peer=peer, tag=tag)
                )
                direction = "sending to" if call is dist.isend else "receiving from"
                whats.append(f"{direction} rank {self.place.global_rank(block)} ({kind})")
        self._count(kind, sends)
        if not operations:
            return Transfer([], [])
        together = "; ".join(dict.fromkeys(whats))
        try:
            works = dist.batch_isend_irecv(operations)
        except RuntimeError as error:
            raise RuntimeError(f"{self.op}: {together} failed: {error}") from error
        if len(works) != len(whats):  # NCCL returns one work for the whole batch
            whats = [together] * len(works)
        named = [(work, f"{self.op}: {what}") for work, what in zip(works, whats, strict=True)]
        return Transfer(named, [message.tensor for message in operations])

    def all_gather(self, kind: Kind, x: Tensor) -> Tensor:
        """[world_size, *x.shape]: every block's x, all of one shape, in block order."""
        gathered = x.new_empty((self.place.world_size, *x.shape))
        self._run(kind, ALL_GATHER, gathered.view(-1), x.reshape(-1))
        self._count_collective(kind, x)
        return self._in_block_order(gathered)

    def reduce_scatter(self, kind: Kind, x: Tensor) -> Tensor:
        """The sum over ranks of this rank's block of x [world_size, ...], in x's dtype."""
        in_group_order = torch.empty_like(x)
        in_group_order[list(self.place.members)] = x
        mine = x.new_empty(x.shape[1:])
        self._run(kind, REDUCE_SCATTER, mine.view(-1), in_group_order.view(-1))
        self._count_collective(kind, mine)
        return mine

    def _in_block_order(self, gathered: Tensor) -> Tensor:
        members = self.place.members
        return gathered if members == tuple(range(len(members))) else gathered[list(members)]

    def _run(self, kind: Kind, collective, output: Tensor, x: Tensor) -> None:  # type: ignore[no-untyped-def]
        if x.numel() == 0:
            return
        try:
            collective(output, x, group=self.place.group)
        except RuntimeError as error:
            ranks = [self.place.global_rank(block) for block in range(self.place.world_size)]
            raise RuntimeError(
                f"{self.op}: {kind} collective of ranks {ranks} failed: {error}"
            ) from error

    def _count(self, kind: Kind, sends: Sequence[Message]) -> None:
        if self.traffic is None:
            return
        name = f"{kind}_bytes"
        sent = sum(message.tensor.nbytes for message in sends)
        setattr(self.traffic, name, getattr(self.traffic, name) + sent)
        self.traffic.messages += sum(message.tensor.numel() > 0 for message in sends)

    def _count_collective(self, kind: Kind, share: Tensor) -> None:
        others = (block for block in range(self.place.world_size) if block != self.place.block)
        self._count(kind, [Message(block, share) for block in others])
