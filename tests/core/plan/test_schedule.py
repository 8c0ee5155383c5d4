"""Schedules painted into the matrix: each visible pair exactly once, only the needed rows."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from nnscaler_ring.core.exchange import Cut
from nnscaler_ring.core.exchange.direct import direct
from nnscaler_ring.core.plan import schedule as schedule_module
from nnscaler_ring.core.plan import tile as tile_module
from nnscaler_ring.core.plan.layout import (
    LAYOUTS,
    Contiguous,
    PackedDocuments,
    SequenceLayout,
    Striped,
    Zigzag,
)
from nnscaler_ring.core.plan.masks import mask_of
from nnscaler_ring.core.plan.schedule import (
    CAUSAL,
    FULL,
    Mask,
    PairWork,
    Rows,
    Schedule,
    Window,
    cut_rows,
    row_count,
)
from nnscaler_ring.core.plan.tile import UNBOUNDED, KernelCall, Tile, batched, trim
from tests.core.plan.test_layout import tokens_of_layout
from tests.core.plan.test_tile import assert_trimmed
from tests.masks import examples, random_mask
from tests.oracle import random_cu_seqlens, visible

WINDOWS = (
    *((causal, (-1, -1)) for causal in (True, False)),
    *((True, (left, -1)) for left in (0, 1, 3, 11)),
    *((False, window) for window in ((0, 0), (5, 2), (-1, 4), (2, -1), (-1, 0), (40, 40))),
)


@dataclass(frozen=True)
class Problem:
    """A schedule beside the definition of what it must compute, token by token.

    `mask` are the oracle's arguments; `q_tokens[rank]` the tokens of a rank's query rows.
    """

    schedule: Schedule
    q_tokens: list[list[int]]
    k_tokens: list[list[int]]
    mask: dict[str, Any]
    what: str

    @property
    def ranks(self) -> range:
        return range(len(self.q_tokens))

    @cached_property
    def sees(self) -> Tensor:
        """Which token sees which, by the definition in the oracle: bool [tokens, tokens of k]."""
        return visible(sum(map(len, self.q_tokens)), sum(map(len, self.k_tokens)), **self.mask)

    def block(self, rank: int, sources: Iterable[int]) -> Tensor:
        """Which row of `rank` sees which key of the sources, one after another: bool."""
        keys = [token for source in sources for token in self.k_tokens[source]]
        return self.sees[self.q_tokens[rank]][:, keys]

    def read_rows(self, rank: int, source: int) -> list[int]:
        """The key rows of `source` that some query of `rank` sees."""
        return self.block(rank, [source]).any(0).nonzero().flatten().tolist()


def dense_problem(
    q_name: str,
    k_name: str,
    lens: Sequence[int],
    causal: bool,
    window: tuple[int, int],
    mask: str | None = None,
) -> Problem:
    return Problem(
        Schedule(
            LAYOUTS[q_name].for_shards(lens),
            LAYOUTS[k_name].for_shards(lens),
            mask_of(mask) if mask else Window.from_window(causal, window),
        ),
        tokens_of_layout(q_name, lens),
        tokens_of_layout(k_name, lens),
        {"causal": causal, "window_size": window, "mask": mask},
        f"{q_name} queries, {k_name} keys, {lens}, {causal=}, {window=}, {mask=}",
    )


def packed_problem(
    q_name: str,
    k_name: str,
    lens: Sequence[int],
    lens_k: Sequence[int],
    cu: tuple[int, ...],
    cu_k: tuple[int, ...],
    causal: bool,
    window: tuple[int, int],
    mask: str | None = None,
) -> Problem:
    return Problem(
        Schedule(
            PackedDocuments(LAYOUTS[q_name].for_shards(lens, cu), cu, cu_k),
            PackedDocuments(LAYOUTS[k_name].for_shards(lens_k, cu_k), cu_k, cu_k),
            mask_of(mask) if mask else Window.from_window(causal, window),
        ),
        tokens_of_layout(q_name, lens, cu),
        tokens_of_layout(k_name, lens_k, cu_k),
        {
            "causal": causal,
            "window_size": window,
            "mask": mask,
            "cu_seqlens_q": cu,
            "cu_seqlens_k": cu_k,
        },
        f"{q_name} {lens} {cu}, {k_name} {lens_k} {cu_k}, {causal=}, {window=}, {mask=}",
    )


def random_problems(seed: int, count: int, *, longest: int = 8) -> Iterator[Problem]:
    """Layouts of queries and keys, masks and documents, all at random."""
    rng = random.Random(seed)
    for _ in range(count):
        ranks = rng.randint(1, 5)
        lens, lens_k = (
            [rng.randint(0, longest) * (rng.random() < 0.85) for _ in range(ranks)]
            for _ in range(2)
        )
        q_name = rng.choice(list(LAYOUTS))
        k_name = rng.choice((q_name, *LAYOUTS))
        causal, window = rng.choice(WINDOWS)
        dense = rng.random() < 0.4
        mask = None
        if rng.random() < 0.5:
            mask = random_mask(rng, sum(lens), packed=not dense).text
        if dense:
            yield dense_problem(q_name, k_name, lens, causal, window, mask)
            continue
        if rng.random() < 0.5:
            lens_k = lens
        documents = rng.randint(1, 7)
        cu = tuple(random_cu_seqlens(rng, sum(lens), documents).tolist())
        cu_k = tuple(random_cu_seqlens(rng, sum(lens_k), documents).tolist())
        if lens_k == lens and rng.random() < 0.6:
            cu_k = cu
        yield packed_problem(q_name, k_name, lens, lens_k, cu, cu_k, causal, window, mask)


def paint(tiles: Iterable[Tile], rows: int, keys: int) -> Tensor:
    """How many tiles hold each pair: int [rows, keys]."""
    distance = torch.arange(keys) - torch.arange(rows).unsqueeze(1)
    painted = torch.zeros(rows, keys, dtype=torch.int32)
    for tile in tiles:
        assert 0 <= tile.q0 < tile.q1 <= rows and 0 <= tile.k0 < tile.k1 <= keys, tile
        inside = distance[tile.q, tile.k]
        painted[tile.q, tile.k] += (inside >= tile.lo) & (inside <= tile.hi)
    return painted


def paint_calls(calls: Iterable[KernelCall], rows: int, keys: int) -> Tensor:
    """The same for what a kernel is called with; segments by the definition of their window."""
    painted = torch.zeros(rows, keys, dtype=torch.int32)
    for call in calls:
        if call.segments is None:
            painted += paint(call.tiles, rows, keys)
            continue
        box = painted[call.q, call.k]
        assert all(bounds[0] == 0 for bounds in call.segments)
        assert box.shape == tuple(bounds[-1] for bounds in call.segments), call
        for (q0, q1), (k0, k1) in zip(*map(pairwise, call.segments), strict=True):
            box[q0:q1, k0:k1] += visible(q1 - q0, k1 - k0, window_size=call.window())
    return painted


def check_batches(tiles: Sequence[Tile], rows: int, keys: int) -> int:
    """Batches hold the pairs of the tiles; how many tiles share a call."""
    calls = batched(tuple(tiles))
    assert torch.equal(paint_calls(calls, rows, keys), paint(tiles, rows, keys)), (tiles, calls)
    return len(tiles) - len(calls)


def test_batches_hold_the_pairs_of_their_tiles():
    saved = 0
    for problem in random_problems(12, 150, longest=12):
        for rank, tokens in enumerate(problem.q_tokens):
            tiles = problem.schedule.tiles(rank, list(problem.ranks))
            saved += check_batches(tiles, len(tokens), sum(map(len, problem.k_tokens)))
    assert saved > 100


def test_batches_of_tiles_along_a_diagonal():
    """Tiles of any shape and band, with and without gaps in rows or keys."""
    rng = random.Random(13)
    saved = 0
    for _ in range(200):
        tiles, row, key = [], 0, 0
        for _ in range(rng.randint(1, 6)):
            row, key = (x + rng.choice((0, 0, 1, 3)) for x in (row, key))
            nq, nk = rng.randint(1, 5), rng.randint(1, 5)
            left, right = rng.choice(((-1, -1), (-1, 0), (2, 0), (2, -1), (1, 1)))
            lo = -UNBOUNDED if left < 0 else key + nk - row - nq - left
            hi = UNBOUNDED if right < 0 else key + nk - row - nq + right
            if tile := trim(Tile(row, row + nq, key, key + nk, lo, hi)):
                tiles.append(tile)
            row, key = row + nq, key + nk
        if tiles:
            saved += check_batches(tiles, row, key)
    assert saved > 100


def test_documents_of_any_length_are_one_call():
    """Causal and windowed: short documents whose window cuts nothing go with the long ones."""
    cu = (0, 1, 10, 10, 12, 30, 31)
    for window in ((-1, -1), (4, -1), (1, -1)):
        problem = packed_problem("contiguous", "contiguous", [31], [31], cu, cu, True, window)
        tiles = tuple(problem.schedule.tiles(0, (0,)))
        assert len(tiles) == 5 and len(batched(tiles)) == 1, window


def rows_of(runs: Rows) -> list[int]:
    return [row for start, stop in runs for row in range(start, stop)]


def assert_ascending_runs(runs: Rows) -> None:
    edges = [edge for run in runs for edge in run]
    assert edges == sorted(set(edges)), runs  # not empty, not touching


def test_every_visible_pair_is_in_exactly_one_tile():
    for problem in random_problems(1, 1500):
        for rank in problem.ranks:
            for source in problem.ranks:
                tiles = problem.schedule.tiles(rank, (source,))
                expected = problem.block(rank, [source])
                assert torch.equal(paint(tiles, *expected.shape), expected.int()), problem.what


@pytest.mark.parametrize("name", LAYOUTS)
def test_examples_of_every_kind_of_mask_are_painted(name):
    """A new kind of mask is here by itself."""
    for mask in examples():
        for lens in ([12] * 4, [48], [5, 0, 23, 20]):
            problem = dense_problem(name, name, lens, False, (-1, -1), mask.text)
            for rank in problem.ranks:
                tiles = problem.schedule.tiles(rank, list(problem.ranks))
                expected = problem.block(rank, problem.ranks)
                assert torch.equal(paint(tiles, *expected.shape), expected.int()), problem.what


def test_tiles_of_several_sources_number_the_keys_one_after_another():
    rng = random.Random(0)
    for problem in random_problems(2, 500):
        sources = rng.sample(problem.ranks, rng.randint(1, len(problem.ranks)))
        for order in (list(problem.ranks), sources):
            for rank in problem.ranks:
                tiles = problem.schedule.tiles(rank, order)
                expected = problem.block(rank, order)
                assert torch.equal(paint(tiles, *expected.shape), expected.int()), problem.what


def test_tiles_are_trimmed():
    for problem in random_problems(3, 200):
        for rank in problem.ranks:
            for tile in problem.schedule.tiles(rank, list(problem.ranks)):
                assert_trimmed(tile)


def test_needed_rows_are_the_rows_that_are_read():
    for problem in random_problems(4, 800):
        for rank in problem.ranks:
            for source in problem.ranks:
                needed = problem.schedule.needed_rows(rank, source)
                assert_ascending_runs(needed)
                assert rows_of(needed) == problem.read_rows(rank, source), problem.what


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_messages_cover_the_needed_rows_in_order_in_equal_parts(parts):
    for problem in random_problems(10 + parts, 300):
        for rank in problem.ranks:
            for source in problem.ranks:
                steps = [
                    PairWork.of(problem.schedule, rank, source).step(n, parts) for n in range(parts)
                ]
                needed = problem.read_rows(rank, source)
                sizes = [row_count(step.rows) for step in steps]
                beyond = PairWork.of(problem.schedule, rank, source).step(parts, parts)
                assert not beyond.rows and not beyond.tiles
                assert [row for step in steps for row in rows_of(step.rows)] == needed, problem.what
                assert max(sizes) - min(sizes) <= 1, (sizes, problem.what)
                for step in steps:
                    assert step.source == source
                    assert_ascending_runs(step.rows)
                    _check_step(problem, rank, step)


def _check_step(problem: Problem, rank: int, step: schedule_module.Step) -> None:
    rows = rows_of(step.rows)
    expected = problem.block(rank, [step.source])[:, rows]
    painted = paint(step.tiles, *expected.shape)
    assert torch.equal(painted, expected.int()), (problem.what, step)
    assert bool(painted.any(0).all()), f"a row travels that no tile reads: {step}"
    readers = torch.zeros(len(rows), dtype=torch.int32)
    for tile in step.tiles:
        assert_trimmed(tile)
        readers[tile.k] += 1
    assert step.summed == bool((readers > 1).any()), (problem.what, step)
    assert step.whole == (len(rows) == len(problem.k_tokens[step.source])), (problem.what, step)


def test_cut_rows_takes_rows_by_their_number():
    rng = random.Random(5)
    for _ in range(2000):
        edges = sorted(rng.sample(range(30), 2 * rng.randint(0, 4)))
        runs = tuple(zip(edges[::2], edges[1::2], strict=True))
        start, stop = (rng.randint(0, row_count(runs)) for _ in range(2))
        cut = cut_rows(runs, start, stop)
        assert_ascending_runs(cut)
        assert rows_of(cut) == rows_of(runs)[start:stop], (runs, start, stop)


def test_masks_of_flash_attn_arguments():
    assert Window.from_window(False, (-1, -1)) == FULL
    assert Window.from_window(True, (-1, -1)) == CAUSAL == Window.from_window(True, (-1, 7))
    assert Window.from_window(True, (5, 3)) == Window(5, 0)
    assert Window.from_window(False, (5, 3)) == Window(5, 3)


# The usual cases are one kernel call a step.


@pytest.mark.parametrize("chunk", [2, 3, 100])
@pytest.mark.parametrize("ranks", range(2, 17))
def test_zigzag_causal_is_one_tile_a_step(ranks, chunk):
    layout = Zigzag(2 * ranks * chunk, ranks)
    schedule = Schedule(layout, layout, CAUSAL)
    for rank in range(ranks):
        local = schedule.tiles(rank, (rank,))
        assert [tile[:4] for tile in local] == [(0, 2 * chunk, 0, 2 * chunk)]
        for source in range(ranks):
            assert len(schedule.tiles(rank, (source,))) == 1, (rank, source)


@pytest.mark.parametrize("total", [97, 101, 4099])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_zigzag_causal_is_one_tile_a_step_for_odd_lengths(ranks, total):
    layout = Zigzag(total, ranks)
    schedule = Schedule(layout, layout, CAUSAL)
    for rank in range(ranks):
        for source in range(ranks):
            assert len(schedule.tiles(rank, (source,))) == 1, (rank, source)


@pytest.mark.parametrize("ranks", range(2, 17))
def test_contiguous_causal_is_one_tile_or_none_a_step(ranks):
    layout = Contiguous(tuple(5 + rank % 3 for rank in range(ranks)))
    schedule = Schedule(layout, layout, CAUSAL)
    for rank in range(ranks):
        for source in range(ranks):
            assert len(schedule.tiles(rank, (source,))) == (source <= rank), (rank, source)


@pytest.mark.parametrize("layout", [Contiguous((9,) * 6), Zigzag(55, 6), Striped(55, 6)], ids=str)
def test_full_attention_is_one_tile_a_step(layout):
    schedule = Schedule(layout, layout, FULL)
    tiles = [schedule.tiles(rank, (source,)) for rank in range(6) for source in range(6)]
    assert {len(found) for found in tiles} == {1}
    assert len(schedule.tiles(2, range(6))) == 1


@pytest.mark.parametrize("ranks", [2, 5, 16])
def test_striped_causal_is_one_tile_a_step(ranks):
    layout = Striped(20 * ranks, ranks)
    schedule = Schedule(layout, layout, CAUSAL)
    tiles = [schedule.tiles(rank, (source,)) for rank in range(ranks) for source in range(ranks)]
    assert {len(found) for found in tiles} == {1}


# Balance is a sum.


def pairs_per_rank(layout: SequenceLayout, mask: Mask) -> list[int]:
    schedule = Schedule(layout, layout, mask)
    ranks = range(schedule.world_size)
    return [sum(tile.pairs() for tile in schedule.tiles(rank, ranks)) for rank in ranks]


@pytest.mark.parametrize("ranks", range(2, 17))
def test_zigzag_balances_causal_work(ranks):
    pairs = pairs_per_rank(Zigzag(4096, ranks), CAUSAL)
    assert sum(pairs) == 4096 * 4097 // 2
    # Chunks that differ by one token differ by 2N/4096 in length: under 1 % for 16 ranks.
    assert max(pairs) / min(pairs) < 1.01, pairs


def test_striped_balances_causal_work():
    pairs = pairs_per_rank(Striped(4096, 16), CAUSAL)
    assert max(pairs) / min(pairs) < 1.01, pairs


def test_contiguous_causal_work_is_not_balanced():
    """The last of N ranks has 2 - 1/N times the mean."""
    pairs = pairs_per_rank(Contiguous((1024,) * 4), CAUSAL)
    assert max(pairs) / (sum(pairs) / 4) == pytest.approx(2 - 1 / 4, rel=1e-3)


# Rows that travel, for the masks whose lower bounds are known.


@pytest.mark.parametrize("ranks", [2, 4, 7])
def test_zigzag_causal_sends_three_quarters_of_a_ring(ranks):
    layout = Zigzag(16 * ranks, ranks)
    schedule = Schedule(layout, layout, CAUSAL)
    for rank in range(ranks):
        for source in set(range(ranks)) - {rank}:
            needed = row_count(schedule.needed_rows(rank, source))
            assert needed == (8 if source < rank else 16), (rank, source)


def test_a_window_needs_its_neighbour_only():
    layout = Contiguous((32,) * 4)
    schedule = Schedule(layout, layout, Window(left=10, right=0))
    for rank in range(4):
        for source in range(4):
            expected = {0: ((0, 32),), 1: ((22, 32),)}.get(rank - source, ())
            assert schedule.needed_rows(rank, source) == expected, (rank, source)


def test_documents_send_nothing_across_their_ends():
    layout = PackedDocuments(Contiguous((10,) * 3), (0, 10, 15, 20, 30), (0, 10, 15, 20, 30))
    schedule = Schedule(layout, layout, FULL)
    for rank in range(3):
        for source in set(range(3)) - {rank}:
            assert schedule.needed_rows(rank, source) == ()


# Planning is cheap.


class Counter:
    """Counts the calls of a function and passes them on."""

    def __init__(self, function):
        self.function = function
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.function(*args, **kwargs)


@pytest.fixture
def counters(monkeypatch):
    """Counters of the functions that do the work of planning: per span pair, per tile."""
    found = {}
    for module, name in (
        (tile_module, "merge"),
        (tile_module, "trim"),
        (schedule_module, "trim"),
        (schedule_module, "tiles_of_spans"),
        (schedule_module, "clip_keys"),
    ):
        counter = Counter(getattr(module, name))
        monkeypatch.setattr(module, name, counter)
        found[f"{module.__name__.rpartition('.')[2]}.{name}"] = counter
    return found


def million_token_schedule(
    name: str, *, tokens: int = 1 << 20, ranks: int = 64, documents: int = 1000
) -> Schedule:
    """A schedule that is new to every cache: packed documents of random lengths."""
    rng = random.Random(documents)
    cu = (0, *sorted(rng.sample(range(1, tokens), documents - 1)), tokens)
    layout = PackedDocuments(LAYOUTS[name].for_shards([tokens // ranks] * ranks), cu, cu)
    return Schedule(layout, layout, CAUSAL)


@pytest.mark.parametrize("rank", [0, 17, 63])
@pytest.mark.parametrize("name", ["contiguous", "zigzag"])
@pytest.mark.parametrize(
    ("tokens", "documents"), [(1 << 20, 1000), (1 << 20, 100), (1 << 26, 1000), (1 << 20, 8000)]
)
def test_planning_grows_with_ranks_and_documents_per_rank(counters, name, tokens, documents, rank):
    """One rank's plan with all it sends: not with tokens, nor with all pairs of documents."""
    ranks = 64
    schedule = million_token_schedule(name, tokens=tokens, documents=documents)
    spans = len(schedule.q_layout.spans(rank))
    direct(schedule, rank, Cut(tokens // ranks // 4, tokens // ranks // 8))
    calls = {what: counter.calls for what, counter in counters.items()}
    for what, count in calls.items():
        # Tiles are cut, and trimmed again, only where a pair has several messages.
        least = 0 if what in ("tile.trim", "schedule.clip_keys") else 1
        assert least <= count <= 2 * (spans + ranks), (what, calls, spans)
