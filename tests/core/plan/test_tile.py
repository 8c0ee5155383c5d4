"""Tiles against the set of their pairs, on thousands of random tiles."""

import itertools
import random
from collections.abc import Iterable

import pytest

from nnscaler_ring.core.plan.tile import (
    UNBOUNDED,
    Tile,
    clip_keys,
    merge,
    merge_neighbours,
    trim,
)

Pairs = frozenset[tuple[int, int]]


def pairs_of(tile: Tile) -> Pairs:
    """The visible pairs, from the definition of a tile."""
    return frozenset(
        (i, j)
        for i in range(tile.q0, tile.q1)
        for j in range(tile.k0, tile.k1)
        if tile.lo <= j - i <= tile.hi
    )


def random_tile(rng: random.Random, size: int = 9) -> Tile:
    """Any tile: also empty boxes, empty bands, bands beside the box, unbounded edges."""
    q0, k0 = rng.randint(0, size), rng.randint(0, size)
    lo = rng.choice((-UNBOUNDED, rng.randint(-2 * size, 2 * size)))
    hi = rng.choice((UNBOUNDED, rng.randint(-2 * size, 2 * size)))
    return Tile(q0, q0 + rng.randint(0, size), k0, k0 + rng.randint(0, size), lo, hi)


def random_tiles(seed: int, count: int) -> Iterable[Tile]:
    rng = random.Random(seed)
    return (random_tile(rng) for _ in range(count))


def trimmed_tiles(seed: int, count: int) -> Iterable[Tile]:
    return (tile for drawn in random_tiles(seed, count) if (tile := trim(drawn)))


def assert_trimmed(tile: Tile) -> None:
    """The three promises of Note [Trimmed tiles]."""
    pairs = pairs_of(tile)
    assert {i for i, _ in pairs} == set(range(tile.q0, tile.q1)), f"a row sees no key: {tile}"
    assert {j for _, j in pairs} == set(range(tile.k0, tile.k1)), f"an unseen key: {tile}"
    for edge, cuts in (("lo", tile.lo != -UNBOUNDED), ("hi", tile.hi != UNBOUNDED)):
        without = tile._replace(**{edge: -UNBOUNDED if edge == "lo" else UNBOUNDED})
        assert cuts == (pairs_of(without) != pairs), f"{edge} of {tile} cuts nothing"
    left, right = tile.window()
    assert (left >= 0) == (tile.lo != -UNBOUNDED) and left >= -1, tile
    assert (right >= 0) == (tile.hi != UNBOUNDED) and right >= -1, tile


def test_pairs_counts_the_visible_pairs():
    for tile in random_tiles(1, 5000):
        assert tile.pairs() == len(pairs_of(tile)), tile


def test_pairs_is_exact_for_a_million_tokens():
    n = 1_000_000
    assert Tile(0, n, 0, n).pairs() == n * n
    assert Tile(0, n, 0, n, hi=0).pairs() == n * (n + 1) // 2
    assert Tile(0, n, 0, n, lo=0, hi=0).pairs() == n


def test_trim_keeps_the_pairs_and_its_promises():
    kept = 0
    for tile in random_tiles(2, 5000):
        trimmed = trim(tile)
        if trimmed is None:
            assert not pairs_of(tile), tile
            continue
        kept += 1
        assert pairs_of(trimmed) == pairs_of(tile), tile
        assert_trimmed(trimmed)
    assert kept > 1000


def test_window_is_bottom_right_aligned():
    """Row i of nq sees key j of nk iff -left <= j - (i + nk - nq) <= right."""
    for tile in trimmed_tiles(3, 5000):
        nq, nk = tile.q1 - tile.q0, tile.k1 - tile.k0
        left, right = tile.window()
        seen = {
            (tile.q0 + i, tile.k0 + j)
            for i in range(nq)
            for j in range(nk)
            if (left == -1 or j - (i + nk - nq) >= -left)
            and (right == -1 or j - (i + nk - nq) <= right)
        }
        assert seen == pairs_of(tile), tile


def test_keys_moved_renumbers_the_keys():
    rng = random.Random(4)
    for tile in random_tiles(4, 2000):
        distance = rng.randint(-30, 30)
        moved = tile.keys_moved(distance)
        assert pairs_of(moved) == {(i, j + distance) for i, j in pairs_of(tile)}, (tile, distance)
        assert moved.lo == -UNBOUNDED or tile.lo != -UNBOUNDED, tile
        assert moved.window() == tile.window(), (tile, distance)


def test_clip_keys_keeps_the_pairs_with_these_keys():
    rng = random.Random(5)
    for tile in trimmed_tiles(5, 4000):
        k0, k1 = rng.randint(0, 20), rng.randint(0, 20)
        clipped = clip_keys(tile, k0, k1)
        wanted = {(i, j) for i, j in pairs_of(tile) if k0 <= j < k1}
        assert (pairs_of(clipped) if clipped else set()) == wanted, (tile, k0, k1)
        if clipped:
            assert_trimmed(clipped)


def cut_at_random(rng: random.Random, tile: Tile) -> list[Tile]:
    """Disjoint trimmed tiles with the pairs of `tile`: a grid of random cuts."""
    rows = sorted({tile.q0, tile.q1, *(rng.randint(tile.q0, tile.q1) for _ in range(2))})
    keys = sorted({tile.k0, tile.k1, *(rng.randint(tile.k0, tile.k1) for _ in range(2))})
    boxes = (
        trim(tile._replace(q0=q0, q1=q1, k0=k0, k1=k1))
        for q0, q1 in itertools.pairwise(rows)
        for k0, k1 in itertools.pairwise(keys)
    )
    return [box for box in boxes if box]


def test_merge_is_the_union_of_two_disjoint_tiles_or_none():
    rng = random.Random(6)
    merged = refused = 0
    for whole in trimmed_tiles(6, 3000):
        pieces = cut_at_random(rng, whole)
        others = [random_tile(rng) for _ in range(2)]
        for other in others:
            tile = trim(other)
            if tile and not any(pairs_of(tile) & pairs_of(piece) for piece in pieces):
                pieces.append(tile)
        for a, b in itertools.pairwise(pieces):
            union = merge(a, b)
            if union is None:
                refused += 1
                continue
            merged += 1
            assert pairs_of(union) == pairs_of(a) | pairs_of(b), (a, b, union)
            assert_trimmed(union)
    assert merged > 1000 and refused > 1000


def test_merge_finds_the_one_tile_of_a_tile_cut_in_two():
    """Across a straight cut the box around both with the tighter band is the tile that was cut."""
    rng = random.Random(7)
    for whole in trimmed_tiles(7, 3000):
        row = rng.randint(whole.q0, whole.q1)
        key = rng.randint(whole.k0, whole.k1)
        for halves in (
            (trim(whole._replace(q1=row)), trim(whole._replace(q0=row))),
            (trim(whole._replace(k1=key)), trim(whole._replace(k0=key))),
        ):
            a, b = halves
            # Where a half lost an edge of the band the other half has it, or no half needs it.
            if a and b and {a.lo, b.lo} >= {whole.lo} and {a.hi, b.hi} >= {whole.hi}:
                assert merge(a, b) == whole, (whole, a, b)


def test_merge_neighbours_keeps_the_pairs_and_never_adds_a_tile():
    rng = random.Random(8)
    fewer = 0
    for whole in trimmed_tiles(8, 2000):
        pieces = cut_at_random(rng, whole)
        rng.shuffle(pieces)
        tiles = merge_neighbours(pieces)
        painted = [pair for tile in tiles for pair in pairs_of(tile)]
        assert len(painted) == len(set(painted)), (whole, tiles)
        assert set(painted) == pairs_of(whole), (whole, tiles)
        assert len(tiles) <= len(pieces)
        fewer += len(tiles) < len(pieces)
        for tile in tiles:
            assert_trimmed(tile)
    assert fewer > 500


@pytest.mark.parametrize("hi", [0, 5, UNBOUNDED])
def test_merge_neighbours_joins_row_blocks_of_a_causal_or_full_tile(hi):
    whole = trim(Tile(0, 40, 0, 40, hi=hi))
    assert whole is not None
    blocks = [trim(whole._replace(q0=start, q1=start + 8)) for start in range(0, 40, 8)]
    assert merge_neighbours([block for block in blocks if block]) == [whole]


def test_merge_neighbours_of_nothing_is_nothing():
    assert merge_neighbours([]) == []
