"""The keys of a sequence on one device in chunks, in the order in which a ring would bring them.

What `ring_size` means to a model without a group: `chunks` parts, one computed after the other.
Values and gradients do not depend on their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from nnscaler_ring.core.exchange import GradientStep, Keys, KVExchange
from nnscaler_ring.core.plan.schedule import KeyRows, Schedule
from nnscaler_ring.core.plan.span import even_edges
from nnscaler_ring.core.plan.tile import clip_keys
from nnscaler_ring.core.sums.row_sum import RowSum


class InChunks(NamedTuple):
    """Another exchange, each of whose steps is cut into `chunks` parts of its keys.

    The first part is chunk `first`, then comes the one before it, and so on around the ring.
    """

    exchange: KVExchange
    chunks: int
    first: int = 0

    def steps(self, k: Tensor, v: Tensor) -> Iterator[Keys]:
        for keys in self.exchange.steps(k, v):
            for _, part in self._parts(keys):
                yield part

    def gradient_steps(self, k: Tensor, v: Tensor) -> Iterator[GradientStep]:
        for step in self.exchange.gradient_steps(k, v):
            for rows, part in self._parts(Keys(step.k, step.v, step.tiles, step.rows)):
                cut = GradientStep(*part, RowSum(part.k), RowSum(part.v))
                yield cut
                step.dk.add_(rows, cut.dk.current())
                step.dv.add_(rows, cut.dv.current())

    def gradients(self) -> tuple[Tensor, Tensor]:
        return self.exchange.gradients()

    def _parts(self, keys: Keys) -> Iterator[tuple[slice, Keys]]:
        """The chunks that somebody reads, and their rows."""
        edges = list(pairwise(even_edges(keys.k.shape[1], self.chunks)))
        for distance in range(self.chunks):
            start, stop = edges[(self.first - distance) % self.chunks]
            clipped = (clip_keys(tile, start, stop) for tile in keys.tiles)
            tiles = tuple(tile.keys_moved(-start) for tile in clipped if tile)
            if tiles:
                rows = slice(start, stop)
                whose = _part_of_rows(keys.rows, start, stop)
                yield rows, Keys(keys.k[:, rows], keys.v[:, rows], tiles, whose)


def _part_of_rows(rows: KeyRows, start: int, stop: int) -> KeyRows:
    """Whose keys those from `start` to `stop` are."""
    part = []
    offset = 0
    for source, first, last in rows:
        low = max(first, first + start - offset)
        high = min(last, first + stop - offset)
        if low < high:
            part.append((source, low, high))
        offset += last - first
    return tuple(part)


class WholeSequence:
    """The exchange of one block of queries whose keys are all on this device: one step.

    `dk` and `dv` are the sums over all blocks, for the backward pass.
    """

    def __init__(
        self, schedule: Schedule, block: int, dk: RowSum | None = None, dv: RowSum | None = None
    ) -> None:
        self._dk, self._dv = dk, dv
        self._tiles = schedule.tiles(block, tuple(range(schedule.world_size)))
        self._rows = tuple((source, 0, n) for source, n in enumerate(schedule.k_lens))

    def steps(self, k: Tensor, v: Tensor) -> Iterator[Keys]:
        yield Keys(k, v, self._tiles, self._rows)

    def gradient_steps(self, k: Tensor, v: Tensor) -> Iterator[GradientStep]:
        assert self._dk is not None and self._dv is not None
        yield GradientStep(k, v, self._tiles, self._rows, self._dk, self._dv)

    def gradients(self) -> tuple[Tensor, Tensor]:
        assert self._dk is not None and self._dv is not None
        return self._dk.current(), self._dv.current()
