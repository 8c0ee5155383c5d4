"""The gathered exchange: its stages, its bytes beside the direct exchange's, its few calls.

What it computes is tested where all exchanges are: the contract, the ops, the order of messages.
"""

from importlib import import_module
from itertools import accumulate

import pytest

from nnscaler_ring.core.exchange import EXCHANGES
from nnscaler_ring.core.exchange.gathered import stage_distances
from nnscaler_ring.core.exchange.program import Compute, Post
from nnscaler_ring.core.op.call import plan_call
from nnscaler_ring.core.plan.layout import LAYOUTS, PackedDocuments
from nnscaler_ring.core.plan.schedule import CAUSAL, Schedule
from tests.cases import Case, all_cases, check_results, run_cases, sample
from tests.core.plan.test_folded import DISTRIBUTIONS
from tests.core.plan.test_schedule import random_problems
from tests.ranks import RankPool

# The package's attribute of that name is the function.
module = import_module("nnscaler_ring.core.exchange.gathered")


def folded(name: str, tokens: int, ranks: int, layout: str = "folded") -> Schedule:
    cu = (0, *accumulate(DISTRIBUTIONS[name](tokens)))
    lens = [tokens // ranks] * ranks
    documents = PackedDocuments(LAYOUTS[layout].for_shards(lens, cu), cu, cu)
    return Schedule(documents, documents, CAUSAL)


def in_small_stages(ranks: list[int], cases: list[Case]) -> tuple[object, int]:
    """On one rank: results where a stage brings one shard, and the most stages of a case."""
    usual, module.STAGE_SHARDS = module.STAGE_SHARDS, 1
    plan_call.cache_clear()
    stages: list[int] = []
    original = module.stage_distances

    def counted(schedule: Schedule) -> list[list[int]]:
        found = original(schedule)
        stages.append(len(found))
        return found

    module.stage_distances = counted
    try:
        return run_cases(ranks, cases), max(stages)
    finally:
        module.STAGE_SHARDS, module.stage_distances = usual, original
        plan_call.cache_clear()


@pytest.mark.parametrize("ranks", [3, 4])
def test_several_stages_are_exact(pool: RankPool, ranks: int) -> None:
    cases = [c for c in all_cases(2) if c.world_size == ranks and c.exchange == "gathered"]
    cases = sample(iter(cases), 30, seed=ranks)
    results = pool.run(ranks, in_small_stages, cases)
    assert {stages for _, stages in results} == {ranks - 1}
    check_results(cases, [shards for shards, _ in results])


def test_sends_what_the_direct_exchange_sends() -> None:
    for problem in random_problems(seed=5, count=60):
        for rank in problem.ranks:
            one, other = (
                EXCHANGES[name].program(problem.schedule, rank).sent()
                for name in ("gathered", "direct")
            )
            assert one.kv_rows == other.kv_rows, problem.what
            rows = [sent.gradient_rows + sent.summed_gradient_rows for sent in (one, other)]
            assert rows[0] == rows[1], problem.what


@pytest.mark.parametrize("ranks", [8, 48, 96])
@pytest.mark.parametrize("name", ["heavy tail", "one", "one huge"])
def test_a_stage_brings_no_more_than_its_budget(name: str, ranks: int) -> None:
    schedule = folded(name, 512 * ranks, ranks)
    budget = module.STAGE_SHARDS * max(schedule.k_lens)
    stages = stage_distances(schedule)
    distances = [distance for stage in stages for distance in stage]
    assert distances == sorted(set(distances))
    for rank in range(0, ranks, 5):
        program = EXCHANGES["gathered"].program(schedule, rank)
        keys = [a for a in program.forward if isinstance(a, Post) and a.carries == "keys"]
        assert len(keys) == len(stages)
        for post in keys:
            assert sum(receive.length for receive in post.receives) <= budget


@pytest.mark.parametrize("name", ["heavy tail", "lognormal", "exponential"])
def test_fewer_calls_than_the_direct_exchange(name: str) -> None:
    schedule = folded(name, 512 * 32, 32)
    for rank in (0, 13, 31):
        computes = {
            exchange: [
                action
                for action in EXCHANGES[exchange].program(schedule, rank).forward
                if isinstance(action, Compute)
            ]
            for exchange in ("gathered", "direct")
        }
        assert len(computes["gathered"]) <= len(computes["direct"])
        tiles = {name: sum(len(c.tiles) for c in some) for name, some in computes.items()}
        pairs = {
            name: sum(tile.pairs() for c in some for tile in c.tiles)
            for name, some in computes.items()
        }
        assert tiles["gathered"] <= tiles["direct"]
        assert pairs["gathered"] == pairs["direct"]
