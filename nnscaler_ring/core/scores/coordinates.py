"""Where a rank's rows stand in the whole sequence, as tensors: for what depends on positions."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from nnscaler_ring.core.plan.schedule import KeyRows, Schedule
from nnscaler_ring.core.plan.span import SequenceLayout
from nnscaler_ring.core.token_index import token_index


class Coordinates(NamedTuple):
    """Per row, int64: `tokens` number the whole (packed) sequence, `positions` are the mask's."""

    tokens: Tensor
    positions: Tensor

    def to(self, device: torch.device) -> Coordinates:
        """The same on a device."""
        return Coordinates(self.tokens.to(device), self.positions.to(device))


def query_coordinates(schedule: Schedule, rank: int) -> Coordinates:
    """Of the query rows that `rank` computes."""
    return _of_shard(schedule.q_layout, rank)


def key_coordinates(schedule: Schedule, rows: KeyRows) -> Coordinates:
    """Of key rows, in the order of a message or a step."""
    shards = [
        (_of_shard(schedule.k_layout, source), slice(start, stop)) for source, start, stop in rows
    ]
    if not shards:
        return Coordinates(torch.arange(0), torch.arange(0))
    return Coordinates(
        torch.cat([shard.tokens[rows] for shard, rows in shards]),
        torch.cat([shard.positions[rows] for shard, rows in shards]),
    )


@lru_cache(maxsize=64)
def _of_shard(layout: SequenceLayout, rank: int) -> Coordinates:
    in_documents = [span.positions for span in layout.spans(rank)]
    return Coordinates(token_index(layout.positions(rank)), token_index(in_documents))
