"""The keys of an exchange in chunks, as a ring would bring them: for a sequence on one device."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from nnscaler_ring.core.exchange import GradientStep, Keys, KVExchange
from nnscaler_ring.core.plan.span import even_edges
from nnscaler_ring.core.plan.tile import clip_keys
from nnscaler_ring.core.sums.row_sum import RowSum


class InChunks(NamedTuple):
    """Another exchange, each of whose steps is cut into `chunks` parts of its keys.

    For scores that do not depend on positions: the parts do not say which rows they are.
    """

    exchange: KVExchange
    chunks: int

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
        total = keys.k.shape[1]
        for start, stop in pairwise(even_edges(total, self.chunks)):
            clipped = (clip_keys(tile, start, stop) for tile in keys.tiles)
            tiles = tuple(tile.keys_moved(-start) for tile in clipped if tile)
            if tiles:
                rows = slice(start, stop)
                yield rows, Keys(keys.k[:, rows], keys.v[:, rows], tiles, ())
