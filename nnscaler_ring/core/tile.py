"""Tiles: boxes of the attention matrix cut by a diagonal band. Integers only, no torch.

Note [Trimmed tiles]
    A tile is trimmed when each of its query rows sees at least one of its keys, each of its keys
    is seen by at least one of its rows, and an edge of the band that cuts nothing is infinite.
    Kernels rely on it three ways: no row of a kernel call is fully masked; the keys of a tile are
    exactly the keys that must travel; and both edges of `window()` are non-negative, which
    flash-attn needs because it reads a negative edge as unbounded.
"""

from __future__ import annotations

from typing import NamedTuple

UNBOUNDED = 1 << 60
"""A distance in tokens that no sequence reaches; `-UNBOUNDED` and `UNBOUNDED` cut nothing."""


class Tile(NamedTuple):
    """Query rows `[q0, q1)` and key rows `[k0, k1)`, visible where `lo <= j - i <= hi`.

    `i` and `j` count in the same local rows as `q0` and `k0`, not from the corner of the box.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    lo: int = -UNBOUNDED
    hi: int = UNBOUNDED

    @property
    def q(self) -> slice:
        """The query rows, to index a tensor with."""
        return slice(self.q0, self.q1)

    @property
    def k(self) -> slice:
        """The key rows, to index a tensor with."""
        return slice(self.k0, self.k1)

    def pairs(self) -> int:
        """How many (query, key) pairs are visible: the unit of cost, in closed form."""
        if self.lo > self.hi:
            return 0
        return self._pairs_up_to(self.hi) - self._pairs_up_to(self.lo - 1)

    def _pairs_up_to(self, diagonal: int) -> int:
        # Row q0 + t has clamp(first + t, 0, num_keys) keys with j - i <= diagonal.
        num_keys = self.k1 - self.k0
        first = self.q0 + diagonal - self.k0 + 1
        return _clamped_sum(first + self.q1 - self.q0, num_keys) - _clamped_sum(first, num_keys)

    def window(self) -> tuple[int, int]:
        """The band as flash-attn's `(left, right)`: bottom-right aligned, -1 for unbounded."""
        diagonal = self.k1 - self.q1
        left = -1 if self.lo == -UNBOUNDED else diagonal - self.lo
        right = -1 if self.hi == UNBOUNDED else self.hi - diagonal
        return left, right

    def keys_moved(self, distance: int) -> Tile:
        """The same pairs when every key row is renumbered `j -> j + distance`."""
        lo = self.lo if self.lo == -UNBOUNDED else self.lo + distance
        hi = self.hi if self.hi == UNBOUNDED else self.hi + distance
        return Tile(self.q0, self.q1, self.k0 + distance, self.k1 + distance, lo, hi)


def _clamped_sum(stop: int, cap: int) -> int:
    """Sum of clamp(x, 0, cap) over all integers x < stop."""
    if stop <= 0:
        return 0
    inside = min(stop, cap)
    return inside * (inside - 1) // 2 + (stop - inside) * cap


def trim(tile: Tile) -> Tile | None:
    """Drop rows and keys that see nothing, make idle edges infinite; None if nothing is left.

    See Note [Trimmed tiles].
    """
    q0, q1, k0, k1, lo, hi = tile
    q0, q1 = max(q0, k0 - hi), min(q1, k1 - lo)
    k0, k1 = max(k0, q0 + lo), min(k1, q1 + hi)
    if q0 >= q1 or k0 >= k1 or lo > hi:
        return None
    if k0 - (q1 - 1) >= lo:
        lo = -UNBOUNDED
    if (k1 - 1) - q0 <= hi:
        hi = UNBOUNDED
    return Tile(q0, q1, k0, k1, lo, hi)


def merge(a: Tile, b: Tile) -> Tile | None:
    """One tile that holds exactly the pairs of two disjoint trimmed tiles, or None.

    The only candidate is the box around both with the tighter of the two bands. It is right when
    it loses no pair inside either box and holds no pair outside of them.
    """
    lo, hi = max(a.lo, b.lo), min(a.hi, b.hi)
    box = Tile(min(a.q0, b.q0), max(a.q1, b.q1), min(a.k0, b.k0), max(a.k1, b.k1), lo, hi)
    pairs_a, pairs_b = a.pairs(), b.pairs()
    if (
        box.pairs() == pairs_a + pairs_b
        and Tile(*a[:4], lo, hi).pairs() == pairs_a
        and Tile(*b[:4], lo, hi).pairs() == pairs_b
    ):
        return trim(box)
    return None


def merge_neighbours(tiles: list[Tile]) -> list[Tile]:
    """Fewer tiles with the same pairs: merges neighbours in row order, then in key order."""
    for order in (lambda t: (t.q0, t.k0), lambda t: (t.k0, t.q0)):
        merged: list[Tile] = []
        for tile in sorted(tiles, key=order):
            while merged and (union := merge(merged[-1], tile)):
                merged.pop()
                tile = union
            merged.append(tile)
        tiles = merged
    return tiles


def clip_keys(tile: Tile, k0: int, k1: int) -> Tile | None:
    """The part of a tile whose keys are in `[k0, k1)`, trimmed; None if that is empty."""
    return trim(tile._replace(k0=max(tile.k0, k0), k1=min(tile.k1, k1)))
