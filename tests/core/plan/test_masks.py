"""Masks as values: what they mean, their text, their bands, and what is refused."""

import random
from itertools import product

import numpy
import pytest
import torch

from nnscaler_ring.core.plan.masks import KINDS, Band, Mask, mask_of
from nnscaler_ring.core.plan.masks.contract import disjoint
from nnscaler_ring.core.plan.masks.text import CONSTANTS
from nnscaler_ring.core.plan.span import Span
from nnscaler_ring.masks import CAUSAL, FULL, Chunks, Documents, Prefix, Rectangles, Window
from tests.masks import examples, random_mask, shown

QUERY, KEY = torch.arange(60).unsqueeze(1), torch.arange(60).unsqueeze(0)


def random_masks(seed: int, count: int) -> list[Mask]:
    rng = random.Random(seed)
    return [random_mask(rng, rng.randint(0, 20)) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_examples_of_itself(kind):
    assert KINDS[kind].examples
    for text in KINDS[kind].examples:
        assert isinstance(mask_of(text), KINDS[kind])


def test_a_mask_means_what_it_says():
    """`sees` against the definitions written out in tests/masks.py, element by element, as ints."""
    for mask in (*examples(), *random_masks(1, 300)):
        expected = shown(mask, QUERY, KEY)
        assert torch.equal(mask.sees(QUERY, KEY) + torch.zeros(60, 60, dtype=bool), expected), mask
        for query, key in ((0, 0), (7, 3), (3, 7), (19, 20)):
            assert bool(mask.sees(query, key)) == bool(expected[query, key]), (mask, query, key)


def test_what_the_names_say():
    """Three masks spelled out by hand."""
    assert shown(Chunks(2), QUERY[:4], KEY[:, :4]).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 1, 1],
    ]
    assert shown(Prefix(2), QUERY[:4], KEY[:, :4]).int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]
    slices = Rectangles([(0, 2, 0, 4, "causal"), (2, 4, 1, 4, "bi_causal"), (2, 3, 0, 2)])
    assert shown(slices, QUERY[:4], KEY[:, :4]).int().tolist() == [
        [1, 1, 1, 0],
        [1, 1, 1, 1],
        [1, 1, 1, 0],
        [0, 0, 1, 1],
    ]


def test_text_makes_the_same_mask():
    for mask in (*examples(), *random_masks(2, 300), *CONSTANTS.values()):
        assert mask_of(mask.text) == mask_of(f" {mask!r} ") == mask
        assert "\n" not in mask.text
    assert mask_of("CAUSAL & Window(5)") == CAUSAL & Window(left=5)
    assert mask_of("Rectangles([[0, 4, 0, 4]])") == Rectangles([(0, 4, 0, 4, "full")])
    assert (repr(CAUSAL), repr(FULL), repr(Window(3))) == (
        "Window(right=0)",
        "Window()",
        "Window(left=3)",
    )


def test_bands_of_two_spans_hold_each_visible_pair_once():
    rng = random.Random(3)
    for mask in (*examples(), *random_masks(4, 200)):
        for _ in range(3):
            q, k = (Span(0, rng.randint(-3, 30), rng.randint(1, 20)) for _ in range(2))
            bands = list(mask.bands(q, k))
            for query, key in product(q.positions, k.positions):
                if query < 0:
                    continue  # definitions count from 0; those of packed queries are in schedules
                inside = [
                    band.q0 <= query < band.q1
                    and band.k0 <= key < band.k1
                    and band.lo <= key - query <= band.hi
                    for band in bands
                ]
                expected = key >= 0 and bool(mask.sees(query, key))
                if key >= 0:
                    assert sum(inside) == expected, (mask, q, k, query, key)


def test_bands_without_one_another_are_disjoint_and_hold_the_same():
    rng = random.Random(5)

    def band() -> Band:
        edges = [sorted(rng.randint(0, 8) for _ in range(2)) for _ in range(2)]
        return Band(*edges[0], *edges[1], rng.randint(-8, 4), rng.randint(-4, 8))

    def pairs(some: Band) -> list[tuple[int, int]]:
        return [
            (q, k)
            for q, k in product(range(some.q0, some.q1), range(some.k0, some.k1))
            if some.lo <= k - q <= some.hi
        ]

    for _ in range(500):
        bands = [band() for _ in range(rng.randint(1, 4))]
        found = [pair for some in disjoint(bands) for pair in pairs(some)]
        assert len(found) == len(set(found))
        assert set(found) == {pair for some in bands for pair in pairs(some)}
        assert all(some.is_empty() == (not pairs(some)) for some in bands)


def test_masks_are_values():
    first, second = (Rectangles([[0, numpy.int64(4), 0, 4]]) for _ in range(2))
    assert first == second and hash(first) == hash(second) and "numpy" not in first.text
    assert Chunks(numpy.int32(4)).text == "Chunks(size=4)"
    assert Window(1 << 62).text == "Window()"


WRONG = {
    "a negative window": (lambda: Window(left=-2), "left of Window must be at least 0, got -2"),
    "-1 for unbounded": (lambda: Window(-1, 0), "left of Window must be >= 0, got -1; leave it ou"),
    "no size": (lambda: Chunks(0), "size of Chunks must be at least 1, got 0"),
    "half a size": (lambda: Chunks(2.5), "size of Chunks must be an int, got 2.5"),
    "a flag": (lambda: Prefix(True), "length of Prefix must be an int, got True"),
    "a rectangle of three": (lambda: Rectangles([(1, 2, 3)]), "rectangles must be .* got .1, 2, 3"),
    "a rectangle backwards": (lambda: Rectangles([(3, 2, 0, 1)]), "must not stop before it starts"),
    "an unknown band": (lambda: Rectangles([(0, 1, 0, 1, "x")]), "band .* must be one of .*full"),
    "documents that fall": (lambda: Documents([0, 4, 3]), "start at 0 and never fall, got"),
    "documents of no mask": (lambda: Documents([0, 4], 3), "mask of Documents must be a mask"),
    "text that is none": (lambda: mask_of("causal("), "mask must be a mask or its text, such as"),
    "text of a number": (lambda: mask_of("3"), "mask must be a mask or its text"),
    "text that calls": (lambda: mask_of("Chunks(abs(-3))"), r"made of .* got 'abs\(-3\)'"),
    "text of nothing known": (lambda: mask_of("Bands(3)"), r"made of .*got 'Bands\(3\)'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_masks_are_refused(name):
    make, message = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_what_does_not_fit_the_sequence_is_refused():
    for mask, lengths, message in (
        (Prefix((1, 2)), [(8, 8)], "one length for each of the 1 documents, got 2"),
        (Rectangles([(0, 9, 0, 2)]), [(8, 8)], r"rectangles\[0\] must lie within the 8 positions"),
        (Documents([0, 7]), [(8, 8)], "must end at the tokens .* 8, got 7"),
        (Documents([0, 4, 8], Rectangles([(0, 5, 0, 2)])), [(8, 8)], "within the 4 positions"),
        (CAUSAL & Prefix((1, 2)), [(8, 8)], "one length for each"),
    ):
        with pytest.raises(ValueError, match=message):
            mask.check(lengths)
    Prefix((1, 2)).check([(8, 8), (3, 4)])
