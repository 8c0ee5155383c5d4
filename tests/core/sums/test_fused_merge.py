"""The Triton merge against the eager one and the definition; on a CPU Triton interprets it."""

import importlib
import itertools
import math
import sys

import pytest
import torch
from torch import Tensor

from nnscaler_ring.core.sums import online_softmax
from nnscaler_ring.core.sums.online_softmax import accumulation_dtype, eager_merge_
from tests.core.sums.test_online_softmax import LEVELS, exact_merge
from tests.tolerances import RELATIVE_L2, assert_close_float64, relative_l2

MODULE = "nnscaler_ring.core.sums.fused_merge"
ACCUMULATED = [torch.float64, torch.float32]


@pytest.fixture(scope="module")
def interpreted():
    """`fused_merge_` as Triton's interpreter runs it; Triton looks when a kernel is defined."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pytest.importorskip("triton", reason="triton is not installed (the extra [test] has it)")
        patch.delitem(sys.modules, MODULE, raising=False)
        yield importlib.import_module(MODULE).fused_merge_
        sys.modules.pop(MODULE, None)


def assert_same(actual: Tensor, expected: Tensor, what: str) -> None:
    if actual.dtype == torch.float64:
        assert_close_float64(actual, expected, what)
        return
    infinite = torch.isinf(expected)
    assert torch.equal(torch.isinf(actual), infinite), what
    error = relative_l2(actual.masked_fill(infinite, 0), expected.masked_fill(infinite, 0))
    assert error <= RELATIVE_L2[torch.float32].limit, (what, error)


@pytest.mark.parametrize("dtype", ACCUMULATED)
def test_merge_of_any_two_levels(interpreted, dtype):
    """Differences of 1e4 and -inf on either or both sides, all pairs of levels as rows."""
    pairs = list(itertools.product(LEVELS, LEVELS))
    lse = torch.tensor(pairs, dtype=dtype).T.unsqueeze(1).unsqueeze(1)  # [2, b, h, rows]
    blocks = torch.randn(2, 1, len(pairs), 1, 3, dtype=dtype)
    blocks[lse.movedim(-1, 2) == -math.inf] = 0.0
    expected, expected_lse = exact_merge(blocks, lse.movedim(-1, 2).unsqueeze(-1))
    out, softmax_lse = blocks[0].clone(), lse[0].clone()
    interpreted(out, softmax_lse, blocks[1], lse[1])
    assert_same(out, expected, "out")
    assert_same(softmax_lse, expected_lse[..., 0].movedim(1, -1), "lse")


def blocks(rows: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(out, lse, block_out, block_lse) as the engine has them: no two with the same strides."""
    wide = accumulation_dtype(dtype)
    out = torch.randn(2, rows + 4, 3, head_dim, dtype=wide)[:, 1 : rows + 1]
    lse = torch.randn(2, rows + 4, 3, dtype=wide).mul(9).transpose(1, 2)[..., 1 : rows + 1]
    block_out = torch.randn(2, 3, rows, head_dim + 3).to(dtype).transpose(1, 2)[..., :head_dim]
    block_lse = torch.randn(2, 3, rows, dtype=wide) * 9
    for some, values, start in ((lse, out, 0), (block_lse, block_out, rows // 4)):
        some[0, 1, start : start + rows // 2] = -math.inf
        values[0, start : start + rows // 2, 1] = 0.0
    return out, lse, block_out, block_lse


@pytest.mark.parametrize("dtype", [*ACCUMULATED, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "head_dim"), [(0, 8), (1, 1), (37, 24), (600, 16), (5, 5000)])
def test_equals_the_eager_merge(interpreted, rows, head_dim, dtype):
    out, lse, block_out, block_lse = blocks(rows, head_dim, dtype)
    given = block_out.clone(), block_lse.clone()
    expected, expected_lse = out.clone(), lse.clone()
    eager_merge_(expected, expected_lse, block_out, block_lse)
    interpreted(out, lse, block_out, block_lse)
    assert_same(out, expected, "out")
    assert_same(lse, expected_lse, "lse")
    assert torch.equal(block_out, given[0]) and torch.equal(block_lse, given[1])


def test_rows_beside_the_block_stay_as_they_are(interpreted):
    memory, lse = torch.ones(1, 9, 2, 4), torch.zeros(1, 2, 9)
    block = torch.full((1, 3, 2, 4), 5.0)
    interpreted(memory[:, 2:5], lse[..., 2:5], block, torch.zeros(1, 2, 3))
    assert memory[0, :, 0, 0].tolist() == [1, 1, 3, 3, 3, 1, 1, 1, 1]
    assert bool((lse[0, 0] != 0).equal(torch.arange(9).sub(3).abs() <= 1))


def test_a_block_that_is_one_number(interpreted):
    """As the values of sinks, all strides are 0."""
    out, lse, _, block_lse = blocks(6, 8, torch.float32)
    number = torch.full((), 5.0).expand(out.shape)
    expected, expected_lse = out.clone(), lse.clone()
    eager_merge_(expected, expected_lse, number, block_lse)
    interpreted(out, lse, number, block_lse)
    assert_same(out, expected, "out")


@pytest.fixture
def fresh_choice():
    online_softmax._merge_of.cache_clear()
    yield
    online_softmax._merge_of.cache_clear()


def test_the_cpu_is_merged_by_torch(fresh_choice):
    assert online_softmax._merge_of("cpu") is eager_merge_


def test_cuda_without_triton_is_merged_by_torch(fresh_choice, monkeypatch):
    monkeypatch.setitem(sys.modules, MODULE, None)
    assert online_softmax._merge_of("cuda") is eager_merge_


def test_cuda_is_merged_by_one_kernel(fresh_choice, interpreted, monkeypatch):
    tried = []
    monkeypatch.setattr(sys.modules[MODULE], "try_out", tried.append)
    assert online_softmax._merge_of("cuda") is interpreted and tried == ["cuda"]


def test_the_trial_is_a_merge(interpreted):
    sys.modules[MODULE].try_out("cpu")


def test_a_triton_that_cannot_compile_is_said_once(fresh_choice, interpreted, monkeypatch, caplog):
    def fail(device_type):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(sys.modules[MODULE], "try_out", fail)
    for _ in range(2):
        assert online_softmax._merge_of("cuda") is eager_merge_
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "Failed to find C compiler" in record.getMessage()
