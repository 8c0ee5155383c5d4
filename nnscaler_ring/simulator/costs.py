"""Seconds that a rank computes, and bytes that it moves, for its tiles and rows on a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nnscaler_ring.core.plan.tile import Tile
from nnscaler_ring.core.sizes import Sizes
from nnscaler_ring.simulator.cluster import Cluster
from nnscaler_ring.simulator.memory import KernelTraits


@dataclass(frozen=True)
class Costs:
    """Seconds of a call's tiles on a cluster's device."""

    sizes: Sizes
    cluster: Cluster
    traits: KernelTraits
    _known: dict[tuple[tuple[Tile, ...], bool, bool], float] = field(default_factory=dict)

    def seconds(self, tiles: Sequence[Tile], *, backward: bool, alone: bool = False) -> float:
        """Of one step's kernel calls and their merging or summing; `alone`: nothing to merge."""
        key = tuple(tiles), backward, alone
        if key not in self._known:
            self._known[key] = self._seconds(tiles, backward, alone)
        return self._known[key]

    def _seconds(self, tiles: Sequence[Tile], backward: bool, alone: bool) -> float:
        rates = self.cluster.rates_for(self.sizes.dtype)
        if backward:
            rate, call_seconds = rates.backward_flops_per_second, rates.backward_call_seconds
            short = rates.backward_short
        else:
            rate, call_seconds = rates.forward_flops_per_second, rates.forward_call_seconds
            short = rates.forward_short
        seconds = 0.0
        calls = self.traits.calls(tiles)
        for tile in calls:
            flops = self.sizes.flops(self.traits.computed_pairs(tile), backward=backward)
            slower = short if self.traits.is_short(tile) else 1.0
            seconds += (call_seconds + flops / rate) * slower
            if not (alone and len(calls) == 1):
                seconds += self.merged_bytes(tile, backward) / self.cluster.memory_bytes_per_second
        return seconds

    def merged_bytes(self, tile: Tile, backward: bool) -> int:
        """Read and written when a call's results join the others."""
        sizes = self.sizes
        touched = sizes.itemsize + 2 * sizes.sum_itemsize
        nq, nk = tile.q1 - tile.q0, tile.k1 - tile.k0
        if backward:
            return touched * (nq * sizes.q_numbers + nk * sizes.kv_numbers)
        return touched * nq * sizes.out_numbers + 8 * nq * sizes.lse_bytes

    def kv_bytes(self, rows: int) -> int:
        """Of a message of keys and values."""
        return rows * self.sizes.kv_numbers * self.sizes.itemsize

    def gradient_bytes(self, rows: int, wide: bool) -> int:
        """Of a message of their gradients."""
        item = self.sizes.sum_itemsize if wide else self.sizes.itemsize
        return rows * self.sizes.kv_numbers * item
