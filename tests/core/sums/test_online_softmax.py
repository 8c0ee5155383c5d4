"""Merging partial attention against the softmax in float64."""

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from nnscaler_ring.core.sums.online_softmax import (
    ROWS_AT_ONCE,
    PartialOutput,
    accumulation_dtype,
    merge_,
)
from tests.tolerances import (
    RELATIVE_L2,
    assert_close_float64,
    assert_close_relative,
    relative_l2,
)

LEVELS = (-math.inf, -1e4, -100.0, -89.0, -1.0, 0.0, 0.5, 89.0, 100.0, 1e4)


def exact_merge(values: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax over blocks in float64: values [n, ...], lse [n, ...]; 0 and -inf for nothing."""
    values, lse = values.double(), lse.double()
    total = torch.logsumexp(lse, 0)
    weights = torch.where(total == -math.inf, 0.0, torch.exp(lse - total))
    return (weights * values).sum(0), total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_merge_of_any_two_levels(dtype):
    """Differences of 1e4 and -inf on either or both sides, all pairs of levels as rows."""
    pairs = list(itertools.product(LEVELS, LEVELS))
    lse = torch.tensor(pairs, dtype=dtype).T.unsqueeze(1).unsqueeze(1)  # [2, b, h, rows]
    blocks = torch.randn(2, 1, len(pairs), 1, 3, dtype=dtype)
    blocks[lse.movedim(-1, 2) == -math.inf] = 0.0
    expected, expected_lse = exact_merge(blocks, lse.movedim(-1, 2).unsqueeze(-1))
    out, softmax_lse = blocks[0].clone(), lse[0].clone()
    merge_(out, softmax_lse, blocks[1], lse[1])
    both_blind = torch.isinf(lse).all(0)
    assert torch.equal(softmax_lse == -math.inf, both_blind)
    assert torch.equal(out[both_blind.movedim(-1, 1)], torch.zeros(1, 3, dtype=dtype))
    if dtype == torch.float64:
        assert_close_float64(out, expected, "out")
        assert_close_float64(softmax_lse, expected_lse[..., 0].movedim(1, -1), "lse")
    else:
        assert_close_relative(out, expected, "out")
        finite = ~both_blind
        assert_close_relative(
            softmax_lse[finite], expected_lse[..., 0].movedim(1, -1)[finite], "lse"
        )


def random_blocks(seed: int, count: int, rows: int, dtype: torch.dtype) -> list[tuple]:
    """(rows, out, lse) of blocks that cover some of the rows; some lse are -inf."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(count):
        start = rng.randint(0, rows - 1)
        covered = slice(start, rng.randint(start + 1, rows))
        n = covered.stop - covered.start
        out = torch.randn(2, n, 3, 4, dtype=torch.float64, generator=generator)
        lse = torch.randn(2, 3, n, dtype=torch.float64, generator=generator) * 50
        blind = torch.rand(2, 3, n, generator=generator) < 0.2
        lse[blind] = -math.inf
        out[blind.transpose(1, 2)] = 0.0
        blocks.append((covered, out.to(dtype), lse.to(accumulation_dtype(dtype))))
    return blocks


def exact(blocks: list[tuple], rows: int) -> tuple[Tensor, Tensor]:
    values = torch.zeros(len(blocks), 2, rows, 3, 4, dtype=torch.float64)
    lses = torch.full((len(blocks), 2, 3, rows), -math.inf, dtype=torch.float64)
    for n, (covered, out, lse) in enumerate(blocks):
        values[n][:, covered], lses[n][..., covered] = out.double(), lse.double()
    out, lse = exact_merge(values, lses.transpose(2, 3).unsqueeze(-1))
    return out, lse[..., 0].transpose(1, 2)


def merged(blocks: list[tuple], rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    partial = PartialOutput(torch.empty(2, rows, 3, 7, dtype=dtype), 4)
    for covered, out, lse in blocks:
        partial.merge_(covered, out.clone(), lse.clone())
    return partial.current()


@pytest.mark.parametrize("rows", [1, 5, ROWS_AT_ONCE, ROWS_AT_ONCE + 1, 2 * ROWS_AT_ONCE + 77])
def test_partial_output_is_the_softmax_in_any_order(rows):
    for seed in range(30 if rows < 10 else 5):
        blocks = random_blocks(seed, 1 + seed % 6, rows, torch.float64)
        expected_out, expected_lse = exact(blocks, rows)
        for order in range(3):
            random.Random(order).shuffle(blocks)
            out, lse = merged(blocks, rows, torch.float64)
            assert_close_float64(out, expected_out, f"out of seed {seed}, order {order}")
            assert_close_float64(lse, expected_lse, f"lse of seed {seed}, order {order}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_of_half_precision_are_merged_in_float32(dtype):
    """The error of 40 merges is that of the blocks' own rounding, not 40 roundings."""
    blocks = [(slice(0, 9), *random_blocks(seed, 1, 1, torch.float64)[0][1:]) for seed in range(40)]
    blocks = [
        (rows, out.expand(2, 9, 3, 4).to(dtype), lse.expand(2, 3, 9).float())
        for rows, out, lse in blocks
    ]
    expected_out, expected_lse = exact(blocks, 9)
    out, lse = merged(blocks, 9, dtype)
    assert out.dtype == lse.dtype == torch.float32
    for actual, expected in ((out, expected_out), (lse, expected_lse)):
        assert relative_l2(actual, expected) <= RELATIVE_L2[torch.float32].limit


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_first_block_of_all_rows_is_kept_without_a_copy(dtype):
    partial = PartialOutput(torch.empty(2, 5, 3, 7, dtype=dtype), 4)
    out, lse = torch.randn(2, 5, 3, 4, dtype=dtype), torch.randn(2, 3, 5)
    partial.merge_(slice(0, 5), out, lse)
    assert partial.current()[0] is out and partial.current()[1] is lse


def test_a_kept_block_of_half_precision_is_widened_by_the_second():
    first, second = (torch.full((1, 2, 1, 1), x, dtype=torch.bfloat16) for x in (1.0, 1.0078125))
    lse = torch.zeros(1, 1, 2)
    partial = PartialOutput(first, 1)
    partial.merge_(slice(0, 2), first, lse)
    partial.merge_(slice(0, 2), second, torch.zeros(1, 1, 2))
    out, _ = partial.current()
    assert out.dtype == torch.float32
    assert torch.equal(out, torch.full_like(out, 1.00390625))  # between two bfloat16 numbers
    assert torch.equal(first, torch.ones_like(first))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 3])
def test_rows_that_saw_nothing_are_zero_and_minus_infinity(dtype, rows):
    partial = PartialOutput(torch.empty(2, rows, 3, 7, dtype=dtype), 4)
    out, lse = partial.current()
    assert out.shape == (2, rows, 3, 4) and lse.shape == (2, 3, rows)
    assert out.dtype == lse.dtype == accumulation_dtype(dtype)
    assert not out.any() and bool((lse == -math.inf).all())


def test_rows_outside_of_a_block_stay_as_they_are():
    partial = PartialOutput(torch.empty(1, 4, 1, 1), 1)
    partial.merge_(slice(1, 3), torch.ones(1, 2, 1, 1), torch.zeros(1, 1, 2))
    out, lse = partial.current()
    assert out.flatten().tolist() == [0, 1, 1, 0]
    assert lse.flatten().tolist() == [-math.inf, 0, 0, -math.inf]
