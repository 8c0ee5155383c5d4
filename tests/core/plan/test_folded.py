"""The folded layout: every token once, as many tokens and pairs on every rank, few runs."""

import random
from collections.abc import Callable
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnscaler_ring.core.plan.folded import FoldedDocuments
from nnscaler_ring.core.plan.layout import PackedDocuments, Zigzag

Lengths = Callable[[int], list[int]]
NODE = 8


def pack(draw: Callable[[random.Random], float], seed: int = 0) -> Lengths:
    """Documents whose lengths are drawn one by one, until they fill the tokens."""

    def lengths(tokens: int) -> list[int]:
        generator, found = random.Random(seed), []
        while tokens:
            found.append(min(tokens, max(1, round(draw(generator)))))
            tokens -= found[-1]
        return found

    return lengths


def one_huge_among_short_ones(tokens: int) -> list[int]:
    short = pack(lambda generator: generator.expovariate(1 / 1024))(tokens - tokens // 2)
    return [*short[::2], tokens // 2, *short[1::2]]


DISTRIBUTIONS: dict[str, Lengths] = {
    "one": lambda tokens: [tokens],
    "equal": lambda tokens: [2048] * (tokens // 2048) + [tokens % 2048],
    "tiny": lambda tokens: [7] * (tokens // 7) + [tokens % 7],
    "lognormal": pack(lambda generator: generator.lognormvariate(8.3, 1.5)),
    "heavy tail": pack(lambda generator: 200 * generator.paretovariate(0.7)),
    "exponential": pack(lambda generator: generator.expovariate(1 / 5000)),
    "one huge": one_huge_among_short_ones,
}


def bounds(lengths: list[int]) -> tuple[int, ...]:
    return (0, *accumulate(lengths))


def pairs(layout: FoldedDocuments, rank: int) -> int:
    """The keys that the rank's queries see under a causal mask."""
    cu = layout.cu_seqlens
    spans = PackedDocuments(layout, cu, cu).spans(rank)
    return sum(s.length * (s.position + 1) + s.length * (s.length - 1) // 2 for s in spans)


@pytest.mark.parametrize("world_size", [64, 256])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_tokens_and_pairs_are_balanced(name: str, world_size: int) -> None:
    layout = FoldedDocuments(bounds(DISTRIBUTIONS[name](1000 * world_size + 37)), world_size)
    assert max(layout.shard_lens) - min(layout.shard_lens) <= 1
    work = [pairs(layout, rank) for rank in range(world_size)]
    assert max(work) <= 1.01 * sum(work) / world_size


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_few_documents_are_cut_at_the_border_of_a_node(name: str) -> None:
    cu = bounds(DISTRIBUTIONS[name](64_000))
    layout = PackedDocuments(FoldedDocuments(cu, 64), cu, cu)
    of_ranks = [{span.document for span in layout.spans(rank)} for rank in range(64)]
    for border in range(NODE, 64, NODE):
        assert len(set().union(*of_ranks[:border]) & set().union(*of_ranks[border:])) <= 2


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 7))
def test_every_token_is_held_once(lengths: list[int], world_size: int) -> None:
    layout = FoldedDocuments(bounds(lengths), world_size)
    tokens: list[int] = []
    for rank in range(world_size):
        spans = layout.spans(rank)
        mine = [s.position + n for s in spans for n in range(s.length)]
        rows = [s.row + n for s in spans for n in range(s.length)]
        assert mine == sorted(mine)
        assert rows == list(range(layout.shard_lens[rank]))
        tokens += mine
    assert sorted(tokens) == list(range(sum(lengths)))
    assert max(layout.shard_lens) - min(layout.shard_lens) <= 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_one_document_is_zigzag(world_size: int) -> None:
    total = 2 * world_size * 7
    folded, zigzag = FoldedDocuments((0, 0, total), world_size), Zigzag(total, world_size)
    assert [folded.spans(r) for r in range(world_size)] == [
        zigzag.spans(r) for r in range(world_size)
    ]
