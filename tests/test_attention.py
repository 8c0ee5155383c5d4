"""The public ops over 1 to 4 ranks equal dense float64 attention: values, lse and gradients."""

import pytest

from tests.cases import all_cases, check, random_packings, sample


def test_sample_of_the_product_equals_dense(pool, device):
    check(pool, sample(all_cases(0), 700, seed=1), device=device)


def test_random_packings_equal_dense(pool, device):
    check(pool, list(random_packings(2, 300)), device=device)


@pytest.mark.full
def test_whole_product_equals_dense(pool):
    check(pool, list(all_cases(0)))


@pytest.mark.parametrize("ranks", [[3, 1], [2, 0], [0, 2], [1, 3, 2], [3, 2, 1, 0]], ids=str)
def test_groups_in_any_order_equal_dense(pool, ranks, device):
    cases = [case for case in all_cases(0) if case.world_size == len(ranks)]
    check(pool, sample(iter(cases), 30, seed=3), ranks=ranks, device=device)
