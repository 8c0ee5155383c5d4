"""The Triton merge as Triton compiles it: for GPUs that are not there, and on one that is.

Apart from test_fused_merge.py, whose interpreter Triton does not take back in a process everywhere.
"""

import importlib
import re
import sys

import pytest
import torch
from torch import Tensor

from nnscaler_ring.core.sums import online_softmax
from nnscaler_ring.core.sums.online_softmax import accumulation_dtype, eager_merge_, merge_
from tests.core.sums.test_fused_merge import ACCUMULATED, MODULE, assert_same, blocks


class NoGpu:
    """What Triton asks of a driver to compile for a GPU that is not there."""

    def __init__(self, compute_capability: int) -> None:
        self.compute_capability = compute_capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.compute_capability, warp_size=32)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """The PTX of what `fused_merge_` would launch for some tensors on a compute capability."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # the default, which Triton warns about
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton = pytest.importorskip(
        "triton", reason="triton is not installed (the extra [test] has it)"
    )
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        pytest.skip("triton before 3.6 goes on interpreting in a process where it once did")
    from triton.runtime import driver

    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    module = importlib.import_module(MODULE)
    merge = module._merge

    def compile_for(compute_capability: int, *tensors: Tensor) -> str:
        codes = []

        class Compiles:
            def __getitem__(self, grid):
                return lambda *args, **sizes: codes.append(
                    merge.warmup(*args, grid=grid, **sizes).asm
                )

        monkeypatch.setattr(module, "_merge", Compiles())
        monkeypatch.setattr(driver, "_active", NoGpu(compute_capability))
        module.fused_merge_(*tensors)
        assert codes[0]["cubin"]
        return codes[0]["ptx"]

    yield compile_for
    sys.modules.pop(MODULE, None)


@pytest.mark.parametrize("dtype", [*ACCUMULATED, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute_capability", [80, 90, 100])
def test_compiled_for_a_gpu_it_moves_16_bytes_at_a_time(compiled, compute_capability, dtype):
    """Triton needs no GPU to compile. All but the lse goes in the widest loads and stores."""
    wide = accumulation_dtype(dtype)
    out, lse = torch.zeros(1, 300, 4, 128, dtype=wide), torch.zeros(1, 300, 4, dtype=wide)
    block_out, block_lse = torch.zeros(1, 200, 4, 128, dtype=dtype), torch.zeros(1, 4, 200)
    ptx = compiled(
        compute_capability, out[:, 64:264], lse.transpose(1, 2)[..., 64:264], block_out, block_lse
    )
    of_a_program = 4096 * (2 * wide.itemsize + dtype.itemsize) / 128  # read and written, read
    per_thread = 16 * len(re.findall(r"(?:ld|st)\.global\.v\d", ptx))
    assert per_thread == of_a_program, ptx


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [*ACCUMULATED, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "head_dim"), [(1, 1), (37, 24), (5000, 128)])
def test_on_a_gpu_it_equals_the_eager_merge(rows, head_dim, dtype):
    pytest.importorskip("triton", reason="triton is not installed")
    sys.modules.pop(MODULE, None)
    online_softmax._merge_of.cache_clear()
    tensors = [x.cuda() for x in blocks(rows, head_dim, dtype)]
    expected, expected_lse = tensors[0].clone(), tensors[1].clone()
    eager_merge_(expected, expected_lse, *tensors[2:])
    merge_(*tensors)
    assert_same(tensors[0], expected, "out")
    assert_same(tensors[1], expected_lse, "lse")
