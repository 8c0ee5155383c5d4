"""Every kernel on a GPU, tile by tile, against dense float64."""

import random
from dataclasses import replace

import pytest
import torch

from nnscaler_ring.core.engine import attention_backward, attention_forward
from nnscaler_ring.core.kernels import (
    KERNELS,
    BackwardTensors,
    Problem,
    flash_form,
    kernel_refusals,
    select_kernel,
)
from nnscaler_ring.core.scores.scores import Scores
from tests.core.kernels.test_reference import (
    SCALE,
    OneDevice,
    Shape,
    check_tile,
    inputs,
    random_shapes,
    tile_of,
)
from tests.oracle import dense_gradients
from tests.tolerances import assert_close_relative

pytestmark = pytest.mark.cuda

DEVICE = "cuda"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CUDA_KERNELS = [name for name in KERNELS if name != "torch_cpu"]
SHAPES = (
    Shape(300, 300, (-1, 0)),
    Shape(384, 384, (-1, 0)),
    Shape(128, 640, (-1, -1)),
    Shape(640, 128, (-1, -1)),
    Shape(640, 128, (-1, 512)),  # taller than wide: cut at the row that sees every key
    Shape(640, 128, (0, -1)),
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


@pytest.mark.parametrize("shape", [(384, 384, (-1, 0)), (192, 320, (-1, -1)), (1, 128, (-1, -1))])
@pytest.mark.parametrize("kernel", CUDA_KERNELS)
def test_a_softmax_lse_below_minus_88(kernel, shape):
    """What is behind the last row or key must not count as a score of 0: its exp would overflow."""
    problem = Problem(DEVICE, torch.bfloat16, 4, 2, 64, 64)
    reason = kernel_refusals(problem)[kernel]
    if reason is not None:
        pytest.skip(f"{kernel}: {reason}")
    q, k, v, dout = inputs(Shape(*shape), (4, 2), (64, 64))
    q, k = q / 4, k / 4
    q[..., 0], k[..., 0] = 1.0, -120 / SCALE
    q, k, v, dout = (x.to(DEVICE, torch.bfloat16) for x in (q, k, v, dout))
    options = {
        "exchange": OneDevice(tile_of(Shape(*shape))),
        "kernel": select_kernel(kernel, problem),
        "scores": Scores(SCALE),
    }
    out, lse = attention_forward(q, k, v, **options)
    found = out, *attention_backward(BackwardTensors(dout, None, q, k, v, out, lse), **options)[:3]
    expected = dense_gradients(q, k, v, dout, softmax_scale=SCALE, window_size=shape[2])
    for name, actual, wanted in zip(
        ("out", "dq", "dk", "dv"), found, (expected[0], *expected[2:]), strict=True
    ):
        if name == "dq":  # its first channel is a sum that cancels to 0
            actual, wanted = actual[..., 1:], wanted[..., 1:]
        assert_close_relative(actual, wanted, f"{name} of {kernel}")


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
