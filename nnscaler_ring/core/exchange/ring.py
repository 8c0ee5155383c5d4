"""The ring exchange: whole shards travel from neighbour to neighbour."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from nnscaler_ring.core.exchange.buffers import Buffer, Home
from nnscaler_ring.core.exchange.contract import GradientStep, Keys, KVExchange, Sent
from nnscaler_ring.core.plan.schedule import Schedule
from nnscaler_ring.core.ranks.transport import Kind, Message, Transfer, Transport
from nnscaler_ring.core.sums.online_softmax import accumulation_dtype
from nnscaler_ring.core.sums.row_sum import RowSum


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
        self._home = Home(k, v)
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
            so_far = Buffer(k, v, k_lens[following], dtype)
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
            buffer = Buffer(k, v, sum(self._plan.k_lens[source] for source in following), k.dtype)
            sends = [Message(self._right, x) for x in held] if following else []
            transfer = self._transport.post(kind, sends, buffer.messages(self._left, True))
            source = self._plan.sources[distance]
            yield Keys(*held, tiles, ((source, 0, self._plan.k_lens[source]),))
            transfer.wait()
            held = buffer.k, buffer.v


class _SumsUnderWay(NamedTuple):
    """Sums of gradients under way along the ring."""

    transfer: Transfer
    arriving: Buffer

    def settle(self, dk: RowSum, dv: RowSum) -> None:
        """Wait for them and add those that arrived."""
        self.transfer.wait()
        dk.add_(slice(None), self.arriving.k)
        dv.add_(slice(None), self.arriving.v)
