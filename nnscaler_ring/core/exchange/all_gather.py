"""The all-gather exchange: all keys at once, and one reduce-scatter of their gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nnscaler_ring.core.exchange.contract import GradientStep, Keys, KVExchange, Sent
from nnscaler_ring.core.plan.schedule import Schedule
from nnscaler_ring.core.ranks.transport import Kind, Transport
from nnscaler_ring.core.sums.online_softmax import accumulation_dtype
from nnscaler_ring.core.sums.row_sum import RowSum


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
