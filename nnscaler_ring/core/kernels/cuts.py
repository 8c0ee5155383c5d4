"""Tiles cut into calls for kernels that know less than a band. Integers only, no torch.

Note [A band in fused calls]
    A causal tile that starts `hi` keys early is a full block and a causal one. Any other band is
    cut into blocks of query rows; within a block the keys that all its rows see are one full call,
    and only the corners at the edges need a mask, at most a few blocks wide.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from nnscaler_ring.core.plan.tile import UNBOUNDED, Tile, trim

BLOCK_ROWS = 256
"""Query rows of a block of a band: fused kernels run at a fraction of their rate below that."""


@lru_cache(maxsize=4096)
def fused_calls(tile: Tile) -> tuple[Tile, ...]:
    """The tile as full tiles, causal ones from the top left corner, and small bands.

    Each pair is in exactly one of them.
    """
    return tuple(_calls(tile))


def _calls(tile: Tile) -> Iterator[Tile]:
    q0, q1, k0, k1, lo, hi = tile
    if lo == -UNBOUNDED:
        yield from _causal_calls(tile)
        return
    # Note [A band in fused calls].
    for start in range(q0, q1, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, q1)
        block = Tile(start, stop, k0, k1, lo, hi)
        seen_by_all = max(k0, stop - 1 + lo), min(k1, start + hi + 1)
        if seen_by_all[1] - seen_by_all[0] <= 2 * BLOCK_ROWS:
            if box := trim(block):
                yield box
            continue
        if corner := trim(block._replace(k1=seen_by_all[0])):
            yield corner
        if rest := trim(block._replace(k0=seen_by_all[0])):
            yield from _causal_calls(rest)


def _causal_calls(tile: Tile) -> Iterator[Tile]:
    """A tile without a left edge: a full block, then a causal one; either may be missing."""
    diagonal = tile.q0 + tile.hi
    if tile.hi == UNBOUNDED or diagonal == tile.k0:
        yield tile
        return
    yield tile._replace(k1=diagonal, hi=UNBOUNDED)
    if causal := trim(tile._replace(k0=diagonal)):
        yield causal


@lru_cache(maxsize=4096)
def score_blocks(tile: Tile, rows: int, keys: int) -> tuple[Tile, ...]:
    """The tile as blocks of at most `rows` x `keys` scores, the empty ones left out."""
    blocks = (
        trim(tile._replace(q0=q0, q1=min(q0 + rows, tile.q1), k0=k0, k1=min(k0 + keys, tile.k1)))
        for q0 in range(tile.q0, tile.q1, rows)
        for k0 in range(tile.k0, tile.k1, keys)
    )
    return tuple(block for block in blocks if block)


def is_top_left_causal(nq: int, nk: int, window: tuple[int, int]) -> bool:
    """Whether row i of a call sees exactly the keys up to i."""
    return window[0] < 0 and window[1] == nq - nk


def banded_tile(nq: int, nk: int, window: tuple[int, int]) -> Tile:
    """The tile of a call from the first row and key on, with the band that `window` stands for."""
    left, right = window
    lo = -UNBOUNDED if left < 0 else nk - nq - left
    hi = UNBOUNDED if right < 0 else nk - nq + right
    return Tile(0, nq, 0, nk, lo, hi)
