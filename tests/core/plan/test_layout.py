"""Layouts against their definitions, token by token."""

import random
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import pytest

import nnscaler_ring
from nnscaler_ring.core.plan.layout import (
    LAYOUTS,
    Contiguous,
    PackedDocuments,
    SequenceLayout,
    Span,
    Striped,
    Zigzag,
)
from tests.oracle import random_cu_seqlens

CORE = Path(nnscaler_ring.__file__).parent / "core"


def contiguous_tokens(lens: Sequence[int]) -> list[list[int]]:
    """The tokens of every rank, in the order of its rows."""
    starts = [sum(lens[:rank]) for rank in range(len(lens))]
    return [list(range(start, start + n)) for start, n in zip(starts, lens, strict=True)]


def zigzag_tokens(lens: Sequence[int]) -> list[list[int]]:
    total, ranks = sum(lens), len(lens)
    chunk = [
        list(range(c * total // (2 * ranks), (c + 1) * total // (2 * ranks)))
        for c in range(2 * ranks)
    ]
    return [chunk[rank] + chunk[2 * ranks - 1 - rank] for rank in range(ranks)]


def striped_tokens(lens: Sequence[int]) -> list[list[int]]:
    return [list(range(rank, sum(lens), len(lens))) for rank in range(len(lens))]


TOKENS: dict[str, Callable[[Sequence[int]], list[list[int]]]] = {
    "contiguous": contiguous_tokens,
    "zigzag": zigzag_tokens,
    "striped": striped_tokens,
}
"""Definitions. A layout without one is what it says itself: `tokens_of_layout`."""


def tokens_of_layout(
    name: str, lens: Sequence[int], cu_seqlens: Sequence[int] | None = None
) -> list[list[int]]:
    """The tokens of every rank, by the definition where there is one."""
    if name in TOKENS:
        return TOKENS[name](lens)
    layout = LAYOUTS[name].for_shards(lens, cu_seqlens)
    return [tokens_of(layout.spans(rank)) for rank in range(len(lens))]


def random_lens(rng: random.Random, *, longest: int = 8) -> list[int]:
    """Lengths of 1 to 6 shards, some of them empty."""
    return [rng.randint(0, longest) * (rng.random() < 0.8) for _ in range(rng.randint(1, 6))]


def tokens_of(spans: Sequence[Span]) -> list[int]:
    """The positions of a rank's rows; the spans must follow one another in the rows."""
    tokens: list[int] = []
    for span in spans:
        assert span.length > 0, span
        assert span.row == len(tokens), span
        tokens += [span.position + n * span.stride for n in range(span.length)]
    return tokens


def assert_layout(layout: SequenceLayout, expected: list[list[int]]) -> None:
    assert layout.shard_lens == tuple(len(tokens) for tokens in expected), layout
    for rank, tokens in enumerate(expected):
        assert tokens_of(layout.spans(rank)) == tokens, (layout, rank)
        assert list(chain(*layout.positions(rank))) == tokens, (layout, rank)


@pytest.mark.parametrize("name", LAYOUTS)
def test_spans_are_the_definition(name):
    rng = random.Random(1)
    for _ in range(1000):
        lens = random_lens(rng, longest=rng.choice((1, 3, 9)))
        for cu_seqlens in (None, random_cu_seqlens(rng, sum(lens), rng.randint(1, 6)).tolist()):
            expected = tokens_of_layout(name, lens, cu_seqlens)
            assert sorted(sum(expected, [])) == list(range(sum(lens)))
            assert_layout(LAYOUTS[name].for_shards(lens, cu_seqlens), expected)


@pytest.mark.parametrize("total", [0, 1, 2, 3, 7, 16, 23])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 16])
def test_any_total_over_any_number_of_ranks(total, ranks):
    lens = [total] + [0] * (ranks - 1)
    assert_layout(Zigzag(total, ranks), zigzag_tokens(lens))
    assert_layout(Striped(total, ranks), striped_tokens(lens))


def test_layouts_are_hashable_values():
    for name, layout in LAYOUTS.items():
        assert len({layout.for_shards([3, 4]), layout.for_shards([3, 4])}) == 1, name
    packed = [PackedDocuments(Contiguous((3, 4)), (0, 7), (0, 7)) for _ in range(2)]
    assert len(set(packed)) == 1


def test_a_rank_of_zigzag_with_touching_chunks_holds_one_span():
    assert Zigzag(12, 3).spans(2) == (Span(0, 4, 4),)
    assert Zigzag(12, 3).spans(0) == (Span(0, 0, 2), Span(2, 10, 2))


@pytest.mark.parametrize("name", LAYOUTS)
def test_documents_are_cut_where_they_end_and_stand_where_their_keys_end(name):
    """Token t of document d of lq queries and lk keys stands at position t - start + lk - lq."""
    rng = random.Random(2)
    for _ in range(1000):
        lens = random_lens(rng)
        documents = rng.randint(1, 6)
        cu, cu_k = (
            tuple(random_cu_seqlens(rng, total, documents).tolist())
            for total in (sum(lens), rng.choice((sum(lens), rng.randint(0, 20))))
        )
        owner = [(d, t) for d in range(documents) for t in range(cu[d], cu[d + 1])]
        base = LAYOUTS[name].for_shards(lens, cu)
        layout = PackedDocuments(base, cu, cu_k)
        assert layout.shard_lens == base.shard_lens
        for rank, tokens in enumerate(tokens_of_layout(name, lens, cu)):
            assert list(chain(*layout.positions(rank))) == tokens
            spans = layout.spans(rank)
            found = [
                (s.document, s.position + n * s.stride) for s in spans for n in range(s.length)
            ]
            expected = []
            for token in tokens:
                d, _ = owner[token]
                shift = (cu_k[d + 1] - cu_k[d]) - (cu[d + 1] - cu[d])
                expected.append((d, token - cu[d] + shift))
            assert found == expected, (layout, rank)
            assert [s.row for s in spans] == [
                sum(s.length for s in spans[:n]) for n in range(len(spans))
            ], (layout, rank)


@pytest.mark.parametrize("module", ["tile", "layout", "schedule", "dilation", "moves", "folded"])
def test_planning_needs_no_torch(module):
    """The module is loaded from its file where `import torch` is an error."""
    script = f"""
        import sys
        from types import ModuleType

        sys.modules["torch"] = None
        for name, folder in (("nnscaler_ring", {str(CORE.parent)!r}),
                             ("nnscaler_ring.core", {str(CORE)!r})):
            package = ModuleType(name)
            package.__path__ = [folder]
            sys.modules[name] = package
        before = set(sys.modules)
        import nnscaler_ring.core.plan.{module}
        third = {{name.partition(".")[0] for name in set(sys.modules) - before}}
        third -= set(sys.stdlib_module_names) | {{"nnscaler_ring"}}
        assert not third, third
        if {module!r} == "schedule":
            from nnscaler_ring.core.plan.layout import Zigzag
            from nnscaler_ring.core.plan.schedule import CAUSAL, PairWork, Schedule
            schedule = Schedule(Zigzag(64, 4), Zigzag(64, 4), CAUSAL)
            assert PairWork.of(schedule, 1, 0).step(0, 1).tiles
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=60)
