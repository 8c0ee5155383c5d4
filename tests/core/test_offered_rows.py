"""Offered rows without ranks: every pair of the definition as often as branches show it."""

import random
from collections import Counter
from collections.abc import Iterator

import pytest

from nnscaler_ring.core.exchange.direct import direct
from nnscaler_ring.core.exchange.rounds import rounds_of
from nnscaler_ring.core.offered_rows import OfferedRows
from nnscaler_ring.core.plan.dilation import Branch, SpanningSegments, Strip, whole_segments
from nnscaler_ring.core.plan.schedule import CAUSAL, FULL, row_count

Pairs = Counter[tuple[int, int]]


def random_patterns(seed: int, count: int) -> Iterator[tuple[SpanningSegments, bool]]:
    """Dense branches, so that many rows are used by several of them."""
    rng = random.Random(seed)
    for _ in range(count):
        shard_lens = tuple(rng.choice((0, 1, rng.randint(2, 20))) for _ in range(rng.randint(2, 5)))
        total = sum(shard_lens)
        lengths = [rng.choice((rng.randint(1, 9), total + 1, 13)) for _ in range(rng.randint(1, 4))]
        branches = tuple(Branch(w, min(w, rng.choice((1, 1, 2, 3)))) for w in lengths)
        offsets = tuple(rng.randrange(branch.rate) for branch in branches)
        yield SpanningSegments(shard_lens, branches, offsets), rng.random() < 0.5


def expected_pairs(rows: SpanningSegments, rank: int, causal: bool) -> Pairs:
    """(query, key) tokens of segments that reach beyond the shard, by the definition."""
    start = sum(rows.token_lens[:rank])
    mine = range(start, start + rows.token_lens[rank])
    found: Pairs = Counter()
    for (length, rate), offset in zip(rows.branches, rows.offsets, strict=True):
        whole = whole_segments(start, mine.stop, length)
        inside = range(start + whole.start, start + whole.start + whole.count * length)
        used = [t for t in range(sum(rows.token_lens)) if t % length % rate == offset]
        for q in used:
            if q in mine and q not in inside:
                found.update(
                    (q, k) for k in used if q // length == k // length and (k <= q or not causal)
                )
    return found


def tokens_of(strips: list[Strip], start: int) -> list[int]:
    return [start + row for strip in strips for row in range(strip.start, strip.stop, strip.step)]


def pairs_of_plan(rows: SpanningSegments, rank: int, causal: bool, message: int) -> Pairs:
    """The same from the tiles of the direct exchange, in messages of about so many keys."""
    schedule = OfferedRows(rows, CAUSAL if causal else FULL, "direct")
    starts = [sum(rows.token_lens[:n]) for n in range(len(rows.token_lens))]
    queries = tokens_of(rows.strips(rank), starts[rank])
    found: Pairs = Counter()

    def paint(tiles, keys: list[int]) -> None:
        for tile in tiles:
            for i in range(tile.q0, tile.q1):
                for j in range(tile.k0, tile.k1):
                    if tile.lo <= j - i <= tile.hi:
                        found[queries[i], keys[j]] += 1

    paint(schedule.tiles(rank, (rank,)), tokens_of(schedule.offered[rank], starts[rank]))
    for round_ in rounds_of(schedule, rank, message)[0]:
        step = round_.incoming
        offered = tokens_of(schedule.offered[step.source], starts[step.source])
        keys = [token for start, stop in step.rows for token in offered[start:stop]]
        if not schedule.in_runs(rank, step.source):
            paint(step.tiles, keys)
            continue
        reading = schedule.reading(rank, tuple((step.source, *run) for run in step.rows))
        paint(reading.tiles, [token for part in reading.slices for token in keys[part]])
    return found


@pytest.mark.parametrize("message", [2, 3, 100])
def test_every_pair_as_often_as_branches_show_it(message):
    in_runs = 0
    for rows, causal in random_patterns(message, 300):
        schedule = OfferedRows(rows, CAUSAL if causal else FULL, "direct")
        ranks = range(len(rows.token_lens))
        in_runs += sum(schedule.in_runs(rank, source) for rank in ranks for source in ranks)
        for rank in ranks:
            assert pairs_of_plan(rows, rank, causal, message) == expected_pairs(
                rows, rank, causal
            ), (rows, rank, causal)
    assert in_runs > 300


@pytest.mark.parametrize("exchange", ["ring", "all_gather"])
def test_whole_shards_are_never_longer_than_their_tokens(exchange):
    for rows, causal in random_patterns(9, 300):
        schedule = OfferedRows(rows, CAUSAL if causal else FULL, exchange)
        for offered, used, tokens in zip(
            schedule.k_lens, rows.shard_lens, rows.token_lens, strict=True
        ):
            assert offered <= min(used, tokens), rows


def test_runs_are_offered_where_any_rank_reads_them():
    """Asked of every rank here; the schedule asks one of all that read the same."""
    offering = 0
    for rows, causal in random_patterns(12, 300):
        schedule = OfferedRows(rows, CAUSAL if causal else FULL, "direct")
        ranks = range(len(rows.token_lens))
        for source in ranks:
            wanted = any(schedule.in_runs(rank, source) for rank in ranks)
            used = len(rows.strips(source))
            assert (len(schedule.offered[source]) > used) is wanted, (rows, causal, source)
            offering += wanted
    assert offering > 100


def test_planning_does_not_ask_every_pair_of_ranks(monkeypatch):
    """Two branches as long as the sequence: every rank reads every other's rows."""
    asked = []
    needed = OfferedRows.needed_rows
    monkeypatch.setattr(OfferedRows, "needed_rows", lambda *x: asked.append(x) or needed(*x))
    tokens = 64 * 1024
    rows = SpanningSegments((1024,) * 64, (Branch(tokens, 4), Branch(tokens, 16)), (1, 1))
    direct(OfferedRows(rows, CAUSAL, "direct"), 40)
    assert len(asked) < 64 * 10, len(asked)


def test_a_pair_travels_as_used_rows_or_runs_whichever_are_fewer():
    for rows, causal in random_patterns(10, 300):
        schedule = OfferedRows(rows, CAUSAL if causal else FULL, "direct")
        for rank in range(len(rows.token_lens)):
            for round_ in rounds_of(schedule, rank, 2048)[0]:
                source = round_.incoming.source
                travels = row_count(round_.incoming.rows)
                assert travels <= row_count(schedule.needed_rows(rank, source))
                assert travels <= rows.token_lens[source]
