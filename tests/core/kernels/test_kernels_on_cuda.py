"""Every kernel on a GPU, tile by tile, against dense float64."""

import random
from dataclasses import replace

import pytest
import torch

from nnscaler_ring.core.kernels import (
    KERNELS,
    Problem,
    flash_form,
    kernel_refusals,
    select_kernel,
)
from tests.core.kernels.test_reference import Shape, check_tile, inputs, random_shapes

pytestmark = pytest.mark.cuda

DEVICE = "cuda"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CUDA_KERNELS = [name for name in KERNELS if name != "torch_cpu"]
SHAPES = (
    Shape(300, 300, (-1, 0)),
    Shape(128, 640, (-1, -1)),
    Shape(640, 128, (-1, -1)),
    Shape(640, 128, (-1, 512)),  # taller than wide: cut at the row that sees every key
    Shape(300, 300, (60, 0)),
    Shape(300, 300, (60, 90)),
    Shape(200, 500, (-1, 0)),
    Shape(1, 77, (-1, -1)),
    Shape(77, 2, (-1, -1)),
)


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (40, 24), (256, 256)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", CUDA_KERNELS)
def test_tiles_equal_dense(kernel, dtype, dims):
    problem = Problem(DEVICE, dtype, 6, 2, *dims)
    reason = kernel_refusals(problem)[kernel]
    if reason is not None:
        pytest.skip(f"{kernel}: {reason}")
    prepared = select_kernel(kernel, problem)
    for shape in SHAPES:
        q, *others = inputs(shape, (6, 2), dims)
        q = q * 2 / dims[0] ** 0.5  # scores of the usual size, whatever the head dim
        check_tile(prepared, shape, *(x.to(DEVICE, dtype) for x in (q, *others)))


@pytest.mark.parametrize("kernel", CUDA_KERNELS)
def test_random_tiles_equal_dense(kernel):
    """Small ones: of every kind, in every dtype."""
    rng = random.Random(1)
    for shape in random_shapes(1, 60, size=40):
        if shape.nk == 1 or shape.window == (0, 0):
            continue  # with one key dq is 0, and a relative error says nothing
        dtype = rng.choice(DTYPES)
        problem = Problem(DEVICE, dtype, 4, 2, 16, 16)
        if kernel_refusals(replace(problem, dtype=dtype))[kernel] is None:
            tensors = (x.to(DEVICE, dtype) for x in inputs(shape, (4, 2), (16, 16)))
            check_tile(select_kernel(kernel, problem), shape, *tensors)


def test_bounds_of_new_documents_do_not_wait_for_what_is_queued():
    device = torch.zeros(1, device=DEVICE).device
    flash_form._copied([0, 1, 2], device)  # makes the pinned memory and the stream
    torch.cuda._sleep(2_000_000_000)  # about a second
    bounds = flash_form._copied([0, 3, 9], device)
    assert not torch.cuda.current_stream(device).query()
    assert bounds.dtype == torch.int32 and bounds.tolist() == [0, 3, 9]
