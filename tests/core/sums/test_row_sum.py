"""Sums of gradient blocks."""

import random

import pytest
import torch

from nnscaler_ring.core.sums.online_softmax import accumulation_dtype
from nnscaler_ring.core.sums.row_sum import RowSum

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_of_random_blocks(dtype):
    """Blocks of whole numbers, so that every order gives the same sum."""
    rng = random.Random(1)
    for _ in range(200):
        rows = rng.randint(1, 6)
        total = RowSum(torch.empty(2, rows, 3, 4, dtype=dtype))
        expected = torch.zeros(2, rows, 3, 4, dtype=torch.float64)
        for _ in range(rng.randint(1, 5)):
            start = rng.randint(0, rows - 1)
            covered = slice(start, rng.randint(start + 1, rows))
            block = torch.randint(-9, 9, (2, covered.stop - start, 3, 4)).to(dtype)
            expected[:, covered] += block.double()
            rng.choice((total.add_, total.take_))(covered, block)
        assert torch.equal(total.current().double(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_first_block_given_away_is_kept_without_a_copy(dtype):
    total = RowSum(torch.empty(1, 4, 2, 3, dtype=dtype))
    block = torch.randn(1, 4, 2, 3, dtype=dtype)
    total.take_(slice(0, 4), block)
    assert total.current() is block


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_that_is_not_given_away_is_not_changed(dtype):
    total = RowSum(torch.empty(1, 4, 2, 3, dtype=dtype))
    block = torch.ones(1, 4, 2, 3, dtype=dtype)
    total.add_(slice(0, 4), block)
    total.add_(slice(0, 4), block)
    assert torch.equal(block, torch.ones_like(block))
    assert torch.equal(total.current(), torch.full_like(total.current(), 2.0))
    assert total.current().dtype == accumulation_dtype(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    """2048 + 1 is 2048 in both; a kept first block is widened before the second is added."""
    for first in ("take_", "add_"):
        total = RowSum(torch.empty(1, 1, 1, 1, dtype=dtype))
        getattr(total, first)(slice(0, 1), torch.full((1, 1, 1, 1), 2048.0, dtype=dtype))
        for _ in range(3):
            total.take_(slice(0, 1), torch.ones(1, 1, 1, 1, dtype=dtype))
        assert total.current().dtype == torch.float32
        assert total.current().item() == 2051.0


def test_a_float32_block_of_a_half_precision_tensor_is_summed_without_rounding():
    total = RowSum(torch.empty(1, 2, 1, 1, dtype=torch.bfloat16))
    total.take_(slice(0, 1), torch.full((1, 1, 1, 1), 1.001))
    total.take_(slice(1, 2), torch.full((1, 1, 1, 1), 2.001))
    assert total.current().flatten().tolist() == torch.tensor([1.001, 2.001]).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_added_is_zero_in_the_dtype_of_the_tensor(dtype, rows):
    like = torch.empty(2, 5, rows, 4, dtype=dtype).transpose(1, 2)
    total = RowSum(like).current()
    assert total.shape == like.shape and total.dtype == dtype
    assert total.is_contiguous() and not total.any()
