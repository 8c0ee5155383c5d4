"""A kernel's calls on tensors that only say that they are on a GPU: a program.

    python -m tests.core.kernels.fake_gpu flash_attn_4 9.0

FakeTensorMode of a CUDA build of torch runs everything but the kernels, whatever package they are
from: arguments, shapes, dtypes and strides are checked by that package's own code. FlashAttention-4
also compiles its kernels for the compute capability; on 10.0 it asks the driver for some of them,
which are left out where there is no driver. The last line says how many calls passed.
"""

import itertools
import sys
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nnscaler_ring.core.engine import attention_backward, attention_forward
from nnscaler_ring.core.kernels import (
    AttentionKernel,
    BackwardTensors,
    Problem,
    flash_form,
    offer_of,
    torch_efficient,
)
from nnscaler_ring.core.plan.tile import Tile, trim
from nnscaler_ring.core.scores.scores import Scores
from nnscaler_ring.core.sums.online_softmax import accumulation_dtype
from tests.core.kernels.test_on_meta import Aten
from tests.core.kernels.test_reference import OneDevice

SQUARE = Tile(0, 300, 0, 300, hi=0)
TILES = {
    "causal": (SQUARE,),
    "full": (Tile(0, 130, 0, 300),),
    "window": (Tile(0, 300, 0, 300, lo=-100, hi=0),),
    "documents": (Tile(0, 100, 0, 100, hi=0), Tile(100, 300, 100, 300, hi=0)),
    "one row": (Tile(0, 1, 0, 300),),
}
HEADS = ((4, 2), (3, 3))
HALF = (torch.bfloat16, torch.float16)
HEAD_DIMS = ((64, 64), (128, 128), (40, 24), (112, 112), (192, 128), (256, 256))


def both_passes(
    kernel: AttentionKernel, problem: Problem, tiles: tuple[Tile, ...], lse_gradient: bool
) -> None:
    """Forward and backward of a batch of two, and of every tensor its shape and dtype."""
    rows, keys = max(t.q1 for t in tiles), max(t.k1 for t in tiles)
    like: Any = {"dtype": problem.dtype, "device": "cuda:0"}
    q = torch.empty(2, rows, problem.num_heads, problem.head_dim, **like)
    k = torch.empty(2, keys, problem.num_kv_heads, problem.head_dim, **like)
    v = torch.empty(2, keys, problem.num_kv_heads, problem.v_head_dim, **like)
    scores = Scores(0.1)
    exchange = OneDevice(*(piece for tile in tiles if (piece := trim(tile))))
    out, lse = attention_forward(q, k, v, exchange=exchange, kernel=kernel, scores=scores)
    assert out.shape == (*q.shape[:3], problem.v_head_dim) and out.dtype == q.dtype
    assert lse.shape == (2, problem.num_heads, rows)
    assert lse.dtype == accumulation_dtype(q.dtype)
    dlse = torch.empty_like(lse) if lse_gradient else None
    gradients = attention_backward(
        BackwardTensors(torch.empty_like(out), dlse, q, k, v, out, lse),
        exchange=exchange,
        kernel=kernel,
        scores=scores,
    )
    for found, of in zip(gradients[:3], (q, k, v), strict=True):
        assert found.shape == of.shape and found.dtype == of.dtype


def problems(compute_capability: tuple[int, int]) -> Iterator[Problem]:
    for heads, dims, dtype in (
        *((HEADS[0], dims, dtype) for dims in HEAD_DIMS for dtype in HALF),
        *((HEADS[1], HEAD_DIMS[0], dtype) for dtype in (*HALF, torch.float32, torch.float64)),
    ):
        yield Problem("cuda", dtype, *heads, *dims, compute_capability=compute_capability)


def copied(integers: list[int], device: torch.device) -> Tensor:
    """Bounds on the device; without a driver there is neither pinned memory nor a stream."""
    return torch.tensor(integers, dtype=torch.int32, device=device)


def main(name: str, compute_capability: str) -> None:
    major, minor = map(int, compute_capability.split("."))
    passed = refused = without_driver = 0
    with (
        FakeTensorMode(),
        patch.object(flash_form, "_copied", copied),
        patch.object(torch_efficient, "aten", Aten()),
    ):
        for problem in problems((major, minor)):
            if reason := offer_of(name).supports(problem):
                print(f"refused: {problem}: {reason}")
                refused += 1
                continue
            kernel = offer_of(name).prepared(problem)
            for (what, tiles), lse_gradient in itertools.product(TILES.items(), (False, True)):
                try:
                    both_passes(kernel, problem, tiles, lse_gradient)
                except Exception as error:
                    if type(error).__name__ == "DynamicLibNotFoundError":
                        without_driver += 1
                        continue
                    raise AssertionError(f"{what}, {lse_gradient=}: {problem}") from error
                passed += 1
    print(f"{passed} calls passed, {without_driver} need a driver, {refused} problems refused")


if __name__ == "__main__":
    main(*sys.argv[1:])
