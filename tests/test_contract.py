"""Every option on every layout, exchange and number of ranks equals dense float64 attention."""

import itertools
from dataclasses import replace

import pytest
import torch

from nnscaler_ring.core.kernels.native.library import library
from tests.contract import FACTORS, check, covering


def test_pairs_of_options_equal_dense(pool, device):
    check(pool, covering(2, seed=1), device)


@pytest.mark.parametrize("kernel", ["torch_cpu", "cpu_tiles"])
def test_the_cpus_kernels_without_and_with_a_compiler(pool, kernel):
    """What "auto" takes where the C++ kernel is not compiled, and where it is."""
    if isinstance(reason := library(), str) and kernel == "cpu_tiles":
        pytest.skip(reason)
    dtypes = itertools.cycle((torch.float32, torch.bfloat16, torch.float16))
    contracts = [
        replace(contract, case=replace(contract.case, kernel=kernel), dtype=dtype)
        for contract, dtype in zip(covering(2, seed=3)[::3], dtypes, strict=False)
    ]
    check(pool, contracts)


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
