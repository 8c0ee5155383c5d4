"""Every op under every plan on the real nnScaler, against dense float64."""

import pytest

from tests.nnscaler.calls import (
    OPS,
    all_cases,
    check,
    sample,
    sample_of_everything,
    sample_of_masks,
)
from tests.ranks import RankPool


@pytest.mark.parametrize("op", OPS)
def test_two_ranks(two_ranks: RankPool, op: str) -> None:
    check(two_ranks, [case for case in sample(2, seed=1) if case.op == op])


@pytest.mark.parametrize("op", OPS)
def test_four_ranks(four_ranks: RankPool, op: str) -> None:
    check(four_ranks, [case for case in sample(4, seed=2) if case.op == op])


def test_masks_go_into_plans_as_text(two_ranks: RankPool) -> None:
    cases = sample_of_masks(2)
    assert {case.op for case in cases} == set(OPS)
    check(two_ranks, cases)


def test_all_options_on_two_ranks(two_ranks: RankPool) -> None:
    check(two_ranks, sample_of_everything(2, seed=3))


def test_all_options_on_four_ranks(four_ranks: RankPool) -> None:
    plans = [c for c in sample_of_everything(4, seed=4) if len(c.plan.steps) > 1]
    check(four_ranks, plans[::2])


@pytest.mark.full
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_whole_product(two_ranks: RankPool, four_ranks: RankPool, world_size: int, op: str) -> None:
    pool = two_ranks if world_size == 2 else four_ranks
    cases = [case for case in all_cases(world_size) if case.op == op]
    for start in range(0, len(cases), 100):
        check(pool, cases[start : start + 100])
