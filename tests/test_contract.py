"""Every option on every layout, exchange and number of ranks equals dense float64 attention."""

import itertools

import pytest

from tests.contract import FACTORS, check, covering


def test_pairs_of_options_equal_dense(pool, device):
    check(pool, covering(2, seed=1), device)


@pytest.mark.full
def test_triples_of_options_equal_dense(pool):
    check(pool, covering(3, seed=2))


def test_pairs_are_covered():
    """The generator does what it says, seen from its results."""
    contracts = covering(2, seed=1)
    seen = {
        (contract.case.op, contract.case.exchange, contract.ranks, contract.dropout_p)[a:b:c]
        for contract in contracts
        for a, b, c in ((0, 2, 1), (0, 3, 2), (1, 3, 1), (2, 4, 1), (0, 4, 3), (1, 4, 2))
    }
    for first, second in itertools.combinations(("op", "exchange", "ranks", "dropout_p"), 2):
        for pair in itertools.product(FACTORS[first], FACTORS[second]):
            assert pair in seen, pair
