"""Rows made from the 64-bit place of a token: the same anywhere, and like independent numbers."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nnscaler_ring.simulator import GeneratedInputs, Sizes, WholeInputs
from nnscaler_ring.simulator.sampled_rows import exact_rows
from tests.oracle import dense_attention, make_qkv

SIZES = Sizes(4, 2, 8, 6)


def test_any_rows_are_a_part_of_the_whole() -> None:
    inputs = GeneratedInputs(SIZES, seed=5)
    whole = inputs.rows("k", torch.arange(100))
    assert whole.shape == (1, 100, 2, 8)
    some = torch.tensor([3, 99, 17])
    assert torch.equal(inputs.rows("k", some), whole[:, some])


class Operations(TorchDispatchMode):
    """Counts them: on a GPU each is a launch."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_on_a_gpu_rows_are_made_in_large_pieces() -> None:
    """The meta device stands for one: its tensors have no memory."""
    with Operations() as operations:
        GeneratedInputs(Sizes(16, 4, 128, 128), device="meta").rows("k", torch.arange(100_000))
    assert operations.count < 500


def test_numbers_have_mean_0_variance_1_and_no_pattern() -> None:
    x = GeneratedInputs(SIZES).rows("q", torch.arange(20_000)).double().view(20_000, -1)
    assert x.mean().abs() < 0.01
    assert (x.var() - 1).abs() < 0.01
    neighbours = (x[1:] * x[:-1]).mean(0)
    columns = torch.corrcoef(x.T) - torch.eye(x.shape[1])
    assert neighbours.abs().max() < 0.05
    assert columns.abs().max() < 0.05


def test_far_tokens_tensors_and_seeds_differ() -> None:
    """float32 arithmetic on places would make neighbours equal from 2^24 on."""
    for start in (2**24, 10**9, 2**33, 2**40):
        rows = GeneratedInputs(SIZES).rows("k", torch.arange(start, start + 50)).view(50, -1)
        assert len(rows.unique(dim=0)) == 50
    near, far = (GeneratedInputs(SIZES).rows("k", torch.tensor([n])) for n in (7, 7 + 2**32))
    assert not torch.equal(near, far)
    first = GeneratedInputs(SIZES).rows("k", torch.arange(9))[..., :6]
    assert not torch.equal(first, GeneratedInputs(SIZES).rows("v", torch.arange(9)))
    assert not torch.equal(
        first, GeneratedInputs(SIZES, seed=1).rows("k", torch.arange(9))[..., :6]
    )


def test_streamed_float64_rows_equal_dense_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnscaler_ring.simulator.sampled_rows.KEYS_AT_ONCE", 16)
    q, k, v = make_qkv(3, 2, 70, 70, 6, 2, 4)
    inputs = WholeInputs(q, k, v)
    queries = torch.tensor([0, 41, 69])
    for left, right in ((None, 0), (9, 0), (None, None), (20, 5)):
        window = (-1 if left is None else left, -1 if right is None else right)
        out, lse = exact_rows(inputs, queries, 0.5, 0, 70, left=left, right=right)
        expected, expected_lse = dense_attention(q, k, v, softmax_scale=0.5, window_size=window)
        torch.testing.assert_close(out, expected[:, queries], rtol=0, atol=1e-12)
        torch.testing.assert_close(lse, expected_lse[..., queries], rtol=0, atol=1e-12)
