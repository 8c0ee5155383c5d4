"""What `nnscaler-ring check` measures: its reference, its errors, and its verdict."""

import math

import pytest
import torch

from nnscaler_ring.core.exchange import EXCHANGES
from nnscaler_ring.tools.check import (
    DILATION_RATES,
    LIMITS,
    MASKS,
    OPS,
    SEGMENT_LENGTHS,
    Case,
    _dense,
    _inputs,
    all_cases,
    error_of,
    is_ok,
    run_cases,
)
from tests.dilated_oracle import dilated_gradients
from tests.oracle import dense_gradients


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("op", ["ring", "varlen"])
def test_reference_equals_the_oracle(op, mask):
    case = Case(op, "direct", mask, torch.float64, 60)
    causal, window_size = MASKS[mask]
    cu_seqlens = case.cu_seqlens()
    inputs = _inputs(60, torch.float64)
    packed = dense_gradients(
        *(x[0] for x in inputs),
        causal=causal,
        window_size=window_size,
        cu_seqlens_q=cu_seqlens,
    )
    for actual, expected in zip(
        _dense(60, torch.float64, mask, tuple(cu_seqlens)), packed, strict=True
    ):
        torch.testing.assert_close(actual[0], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("mask", ["causal", "full"])
def test_reference_of_dilated_attention_equals_the_oracle(mask):
    q, k, v, dout = _inputs(150, torch.float64)
    branches = SEGMENT_LENGTHS, DILATION_RATES
    expected = dilated_gradients(q, k, v, dout, None, *branches, causal=mask == "causal")
    for actual, wanted in zip(
        _dense(150, torch.float64, mask, (0, 150), True), expected, strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-13)


def test_cases_are_the_product_of_everything():
    cases = all_cases(2, quick=False)
    windows = sum(window != (-1, -1) for _, window in MASKS.values())
    masks = len(OPS) * len(MASKS) - windows  # dilated attention has no windows
    assert len(set(cases)) == masks * len(EXCHANGES) * len(LIMITS)
    assert {case.op for case in cases} == set(OPS)
    assert set(all_cases(2, quick=True)) == {
        case for case in all_cases(2, quick=True) if case.mask in MASKS
    }


def test_shards_are_uneven_and_complete():
    for case in all_cases(3, quick=True):
        lens = case.layout(3).shard_lens
        assert sum(lens) == case.tokens
        if case.op != "zigzag order":
            assert max(lens) > 2 * min(lens)


def test_errors_are_seen():
    expected = torch.tensor([1.0, -math.inf, 3.0], dtype=torch.float64)
    assert error_of(expected, expected, torch.float64) == 0
    off = expected + torch.tensor([0, 0, 1e-9])
    assert error_of(off, expected, torch.float64) == pytest.approx(1e-9)
    assert error_of(off, expected, torch.float32) == pytest.approx(1e-9 / math.sqrt(10))
    blind = torch.tensor([1.0, 2.0, 3.0])
    assert error_of(blind, expected, torch.float32) == math.inf
    assert error_of(expected[:2], expected, torch.float32) == math.inf
    broken = torch.tensor([math.nan, -math.inf, 3.0], dtype=torch.float64)
    assert error_of(broken, expected, torch.float64) == math.inf
    seen = torch.tensor([1.0, -math.inf, math.inf], dtype=torch.float64)
    assert error_of(seen, expected, torch.float64) == math.inf


def test_limits_decide():
    case = Case("ring", "direct", "causal", torch.float64, 8)
    assert is_ok(case, 1e-10)
    assert not is_ok(case, 2e-10)
    assert not is_ok(case, math.nan)


def test_uneven_ranks_equal_dense():
    cases = [
        case
        for case in all_cases(3, quick=True)
        if case.exchange == "direct" and case.dtype == torch.float64
    ]
    done: list[None] = []
    errors = run_cases(cases, ranks=3, device="cpu", on_case=lambda: done.append(None))
    assert {case: error for case, error in errors.items() if not is_ok(case, error)} == {}
    assert len(done) == len(cases)
    assert max(errors.values()) > 0  # something was compared
