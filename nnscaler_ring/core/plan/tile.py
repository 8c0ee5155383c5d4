"""Tiles: boxes of the attention matrix cut by a diagonal band. Integers only, no torch.

Note [Trimmed tiles]
    A tile is trimmed when each of its query rows sees at least one of its keys, each of its keys
    is seen by at least one of its rows, and an edge of the band that cuts nothing is infinite.
    Kernels rely on it three ways: no row of a kernel call is fully masked; the keys of a tile are
    exactly the keys that must travel; and both edges of `window()` are non-negative, which
    flash-attn needs because it reads a negative edge as unbounded.

Note [Tiles in one call]
    Kernels with a packed form compute many tiles in one call: a box of rows cut into segments, each
    of whose query rows see the keys of their own segment alone. The segments follow one another in
    rows and in keys, and share one window, which is bottom-right aligned in each. Rows of the box
    that belong to no tile are segments without keys, and the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
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

    @property
    def segments(self) -> Segments | None:
        """None: a tile is one segment; see `TileBatch`."""
        return None

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """The tiles of a call: itself."""
        return (self,)

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


class Segments(NamedTuple):
    """How the box of one call is cut: where each segment starts, and where the last one ends.

    Both count from the corner of the box and are as long; a segment may lack rows or keys.
    """

    q_bounds: tuple[int, ...]
    k_bounds: tuple[int, ...]


@dataclass(frozen=True)
class TileBatch:
    """Several tiles as one call: see Note [Tiles in one call]."""

    tiles: tuple[Tile, ...]
    left: int
    right: int
    segments: Segments

    @property
    def q(self) -> slice:
        """The query rows of the box."""
        return slice(self.tiles[0].q0, self.tiles[-1].q1)

    @property
    def k(self) -> slice:
        """The key rows of the box."""
        return slice(self.tiles[0].k0, self.tiles[-1].k1)

    def window(self) -> tuple[int, int]:
        """The band of every segment, as `Tile.window`."""
        return self.left, self.right


KernelCall = Tile | TileBatch
"""What a kernel computes in one call; both have `q`, `k`, `window()` and `segments`."""


@lru_cache(maxsize=1024)
def batched(tiles: tuple[Tile, ...], most: int = UNBOUNDED) -> tuple[KernelCall, ...]:
    """Trimmed tiles as few calls of at most `most`: a tile joins the first that it can follow."""
    batches: list[_Batch] = []
    for tile in sorted(tiles):
        if not any(len(batch.tiles) < most and batch.took(tile) for batch in batches):
            batches.append(_Batch(tile))
    return tuple(batch.call() for batch in batches)


class _Batch:
    """Tiles that one call can compute, found one after another.

    `left` and `right` are the edges that some tile needs, -1 for none so far. A tile that needs no
    left edge stays as it is under any that lets its last row see its first key (`least_left`); one
    that needs no right edge, under any that lets its first row see its last key (`least_right`).
    """

    def __init__(self, tile: Tile) -> None:
        self.tiles: list[Tile] = []
        self.left = self.right = self.least_left = self.least_right = -1
        assert self.took(tile), tile

    def took(self, tile: Tile) -> bool:
        """Add a tile, if it begins after the last one and agrees on the window."""
        if self.tiles and (tile.q0 < self.tiles[-1].q1 or tile.k0 < self.tiles[-1].k1):
            return False
        own_left, own_right = tile.window()
        left = _edge(self.left, own_left)
        right = _edge(self.right, own_right)
        least_left, least_right = self.least_left, self.least_right
        if own_left < 0:
            least_left = max(least_left, tile.k1 - tile.k0 - 1)
        if own_right < 0:
            least_right = max(least_right, tile.q1 - tile.q0 - 1)
        if left is None or right is None:
            return False
        if 0 <= left < least_left or 0 <= right < least_right:
            return False
        self.left, self.right = left, right
        self.least_left, self.least_right = least_left, least_right
        self.tiles.append(tile)
        return True

    def call(self) -> KernelCall:
        """The tiles found, as one call."""
        if len(self.tiles) == 1:
            return self.tiles[0]
        return TileBatch(tuple(self.tiles), self.left, self.right, segments_of(self.tiles))


def _edge(shared: int, own: int) -> int | None:
    """The edge of both, -1 where neither needs one; None if they need different ones."""
    if shared < 0 or own < 0:
        return max(shared, own)
    return shared if shared == own else None


def segments_of(tiles: Sequence[Tile]) -> Segments:
    """The segments of tiles that follow one another, with the gaps between them."""
    q0, k0 = tiles[0].q0, tiles[0].k0
    corners = [(q0, k0)]
    for tile in tiles:
        # Keys that no row of the box sees, then rows that see no key of it.
        last_row = corners[-1][0]
        for corner in ((last_row, tile.k0), (tile.q0, tile.k0), (tile.q1, tile.k1)):
            if corner != corners[-1]:
                corners.append(corner)
    return Segments(tuple(q - q0 for q, _ in corners), tuple(k - k0 for _, k in corners))
