"""torch's CUDA kernels without a GPU: every call is checked against torch's own operators on the
meta device, and computed densely in float64, so that our side of it is checked in value.
"""

import random
from dataclasses import replace

import pytest
import torch

from nnscaler_ring.core.engine import attention_backward, attention_forward
from nnscaler_ring.core.kernels import (
    BackwardTensors,
    Problem,
    aten_flash,
    flash_form,
    torch_cuda,
    torch_efficient,
)
from nnscaler_ring.core.kernels.aten_flash import AtenFlash
from nnscaler_ring.core.kernels.flash_form import FlashKernel
from nnscaler_ring.core.kernels.head_dims import with_lse_columns
from nnscaler_ring.core.kernels.score_blocks import ScoreBlocks
from nnscaler_ring.core.kernels.torch_cuda import Cudnn, TorchCuda
from nnscaler_ring.core.kernels.torch_efficient import Efficient
from nnscaler_ring.core.plan.tile import Tile
from nnscaler_ring.core.scores.scores import Scores, TileScores
from tests.core.kernels.stand_ins import Aten
from tests.core.kernels.test_reference import (
    HEAD_DIMS,
    HEADS,
    OneDevice,
    Shape,
    check_shares,
    check_tile,
    inputs,
    one_thread,  # noqa: F401
    random_shapes,
    scheduled_shapes,
    tile_of,
)
from tests.core.plan.test_schedule import packed_problem, random_problems
from tests.core.test_engine import check as check_schedule
from tests.one_gpu import attend_on_gpu
from tests.oracle import dense_gradients
from tests.tolerances import assert_close_float64, assert_close_relative

PROBLEM = Problem("cuda", torch.bfloat16, 4, 2, 64, 64, compute_capability=(8, 0))


@pytest.fixture(autouse=True)
def aten(monkeypatch):
    stand_in = Aten()
    for module in (aten_flash, torch_cuda, torch_efficient):
        monkeypatch.setattr(module, "aten", stand_in)
    monkeypatch.setattr(torch_cuda, "CUDNN_ROWS", 1)
    torch_cuda._has_lse_column.cache_clear()
    yield stand_in
    torch_cuda._has_lse_column.cache_clear()


KERNELS = {
    "flash": FlashKernel("torch_cuda", AtenFlash(), PROBLEM),
    "cudnn": FlashKernel("torch_cuda", Cudnn(), PROBLEM),
    "efficient": Efficient("torch_cuda", False),
    "blocks": ScoreBlocks("torch_cuda"),
}


@pytest.fixture(params=list(KERNELS))
def kernel(request):
    return KERNELS[request.param]


@pytest.mark.parametrize("dims", HEAD_DIMS)
@pytest.mark.parametrize("heads", HEADS)
def test_random_tiles_equal_dense(kernel, heads, dims):
    for shape in random_shapes(1, 12, size=12):
        check_tile(kernel, shape, *inputs(shape, heads, dims))


def test_tiles_of_schedules_equal_dense(kernel):
    for shape in scheduled_shapes(2, 8):
        check_tile(kernel, shape, *inputs(shape))


def test_gradients_of_two_tiles_sum_to_the_gradient(kernel):
    rng = random.Random(3)
    for shape in random_shapes(3, 20, size=10):
        check_shares(kernel, shape, rng.randint(0, shape.nk))


def test_any_layout_mask_and_packing_equals_dense(kernel):
    for seed, problem in enumerate(random_problems(31, 30)):
        check_schedule(problem, seed, 1 + seed % 2, kernel)


@pytest.mark.parametrize("dims", [(8, 8), (5, 3), (8, 254), (8, 256)], ids=str)
def test_gradients_through_the_lse_equal_dense(kernel, dims):
    """Columns beside v's channels, and where there is no room for them blocks of scores."""
    for shape in (Shape(6, 6, (-1, 0)), Shape(5, 9, (-1, -1)), Shape(9, 7, (3, 2))):
        q, k, v, dout = inputs(shape, (4, 2), dims)
        dlse = torch.randn(2, 4, shape.nq, dtype=torch.float64)
        expected = dense_gradients(
            q, k, v, dout, dlse=dlse, softmax_scale=0.3, window_size=shape.window
        )
        one_device = OneDevice(tile_of(shape))
        options = {"exchange": one_device, "kernel": kernel, "scores": Scores(0.3)}
        out, lse = attention_forward(q, k, v, **options)
        grads = attention_backward(BackwardTensors(dout, dlse, q, k, v, out, lse), **options)[:3]
        for name, actual, wanted in zip(("dq", "dk", "dv"), grads, expected[2:], strict=True):
            assert_close_float64(actual, wanted, f"{name} of {shape}, {dims}")


@pytest.mark.parametrize("dims", [(8, 8), (8, 256)], ids=str)
def test_gradients_through_the_lse_of_packed_documents(dims):
    """In one call with columns, and tile by tile in blocks of scores."""
    cu, cu_k = (0, 4, 4, 5, 11), (0, 6, 7, 8, 14)
    problem = packed_problem("contiguous", "contiguous", [11], [14], cu, cu_k, True, (2, -1))
    tiles = problem.schedule.tiles(0, (0,))
    shape = Shape(11, 14, (-1, -1))
    q, k, v, dout = inputs(shape, (4, 2), dims, batch=1)
    dlse = torch.randn(1, 4, 11, dtype=torch.float64)
    expected = dense_gradients(
        q[0], k[0], v[0], dout[0], dlse=dlse[0], softmax_scale=0.3, **problem.mask
    )
    kernel = KERNELS["flash"]
    assert any(call.segments for call in kernel.calls(tiles, plain=True))
    options = {"exchange": OneDevice(*tiles), "kernel": kernel, "scores": Scores(0.3)}
    out, lse = attention_forward(q, k, v, **options)
    grads = attention_backward(BackwardTensors(dout, dlse, q, k, v, out, lse), **options)[:3]
    for name, actual, wanted in zip(("dq", "dk", "dv"), grads, expected[2:], strict=True):
        assert_close_float64(actual[0], wanted, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_columns_of_half_precision_carry_twice_its_digits(dtype):
    dlse = torch.randn(1, 2, 50)
    dout, v, out = (
        torch.zeros(1, 50, 2, 3, dtype=dtype),
        *[torch.ones(1, 50, 1, 3, dtype=dtype)] * 2,
    )
    dout, v, out = with_lse_columns(dout, v, out, dlse)
    carried = (dout.float() @ v[0, 0, 0].float()).transpose(1, 2)
    assert bool(((carried - dlse).abs() <= dlse.abs() * torch.finfo(dtype).eps ** 2 + 1e-7).all())
    assert not out[..., 3:].any()


def test_the_library_gets_a_contiguous_lse():
    """The accumulators of a merge have rows before heads in memory."""
    shape = Shape(6, 6, (-1, 0))
    q, k, v, dout = inputs(shape, (4, 2))
    scores = TileScores(0.3, shape.window)
    for kernel in (KERNELS["flash"], KERNELS["efficient"]):
        out, lse = kernel.forward(q, k, v, scores)
        lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
        tensors = BackwardTensors(dout, None, q, k, v, out, lse)
        kernel.backward(tensors, scores)  # the stand-in refuses others


@pytest.mark.parametrize("kernel_name", ["flash", "cudnn"])
def test_a_left_edge_where_queries_are_many_more_than_keys(kernel_name):
    """The library then reads an unbounded right edge as the number of keys."""
    for shape in (Shape(12, 3, (0, -1)), Shape(9, 2, (1, -1)), Shape(30, 4, (2, 25))):
        check_tile(KERNELS[kernel_name], shape, *inputs(shape, (4, 2)))


def test_a_tall_tile_beside_tiles_with_a_left_edge():
    """A full tile would do under any left edge, but for what that makes of the right one."""
    tiles = (Tile(0, 12, 0, 2), Tile(12, 18, 2, 8, lo=-12))
    kernel = KERNELS["flash"]
    q, k, v, dout = inputs(Shape(18, 8, (-1, -1)), (4, 2), batch=1)
    options = {"exchange": OneDevice(*tiles), "kernel": kernel, "scores": Scores(0.3)}
    out, lse = attention_forward(q, k, v, **options)
    dq, *_ = attention_backward(BackwardTensors(dout, None, q, k, v, out, lse), **options)
    for tile in tiles:
        tensors = q[:, tile.q], k[:, tile.k], v[:, tile.k], dout[:, tile.q]
        expected = dense_gradients(*tensors, softmax_scale=0.3, window_size=tile.window())
        assert_close_float64(out[:, tile.q], expected[0], "out")
        assert_close_float64(dq[:, tile.q], expected[2], "dq")


def test_packed_documents_are_one_call(aten):
    """64 documents, one rank: one forward and one backward call."""
    cu = tuple(range(0, 64 * 3 + 1, 3))
    problem = packed_problem("contiguous", "contiguous", [192], [192], cu, cu, True, (-1, -1))
    check_schedule(problem, 0, 1, KERNELS["cudnn"])
    assert aten.calls == ["_flash_attention_forward", "_flash_attention_backward"]


def test_packed_rows_that_see_no_key_between_documents_of_one_row():
    """The longest segment has one row: what the libraries would take for decoding."""
    kernel = KERNELS["flash"]
    tiles = (Tile(0, 1, 0, 3), Tile(1, 2, 5, 9))
    shape = Shape(2, 9, (-1, -1))
    q, k, v, dout = inputs(shape, (4, 2), batch=1)
    (call,) = kernel.calls(tiles, plain=True)
    assert call.segments is not None and len(call.segments.q_bounds) == 4
    options = {"exchange": OneDevice(*tiles), "kernel": kernel, "scores": Scores(0.3)}
    out, lse = attention_forward(q, k, v, **options)
    dq, *_ = attention_backward(BackwardTensors(dout, None, q, k, v, out, lse), **options)
    for row, keys in ((0, slice(0, 3)), (1, slice(5, 9))):
        tensors = q[:, row : row + 1], k[:, keys], v[:, keys], dout[:, row : row + 1]
        expected = dense_gradients(*tensors, softmax_scale=0.3)
        assert_close_float64(out[:, row : row + 1], expected[0], "out")
        assert_close_float64(dq[:, row : row + 1], expected[2], "dq")


@pytest.mark.parametrize("name", ["flash", "cudnn", "efficient"])
def test_views_that_start_anywhere_are_copied(name):
    """As v does that follows k in one buffer, and as a slice of channels does."""
    shape = Shape(8, 8, (-1, 0))
    q, k, v, dout = inputs(shape, (4, 2), (8, 8))

    def moved(x):
        wide = torch.empty(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype)
        wide[..., 1:-2] = x
        behind = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
        return wide[..., 1:-2], behind.copy_(x)

    for tensors in zip(*map(moved, (q, k, v, dout)), strict=True):
        check_tile(KERNELS[name], shape, *tensors)
    k, v = (x[:, :, :1].expand_as(x) for x in (k, v))
    check_tile(KERNELS[name], shape, q, k, v, dout)


def test_tiles_are_cut_where_offsets_of_32_bits_end():
    """Of the rows of a segment, and of 128 for every segment."""
    problem = replace(PROBLEM, num_heads=32, head_dim=128, v_head_dim=128)
    kernel = FlashKernel("torch_cuda", AtenFlash(), problem)
    most = (2**31 - 1) // (32 * 128)
    tokens = 1 << 20
    whole = Tile(0, tokens, 0, tokens, hi=0)
    calls = kernel.calls((whole,), plain=True)
    assert len(calls) == 3 and all(call.q.stop - call.q.start <= most for call in calls)
    assert sum(tile.pairs() for call in calls for tile in call.tiles) == whole.pairs()
    documents = tuple(Tile(n, n + 8, n, n + 8, hi=0) for n in range(0, tokens, 8))
    for call in kernel.calls(documents, plain=True):
        assert call.segments is not None
        assert 8 + 128 * 3 * len(call.tiles) <= most
    half = Tile(0, tokens // 2, 0, tokens // 2, hi=0)
    problem = replace(PROBLEM, num_heads=16, head_dim=128, v_head_dim=128)
    assert FlashKernel("torch_cuda", Cudnn(), problem).calls((half,), plain=True) == (half,)


def test_float32_sums_are_short():
    """Note [Sums of TF32 products]: squares on the diagonal, full ones below it, nothing twice."""
    terms, kernel = torch_efficient.TERMS, KERNELS["efficient"]
    causal = Tile(0, 4 * terms, 0, 4 * terms, hi=0)
    calls = kernel.calls((causal,), plain=True)
    assert sum(call.pairs() for call in calls) == causal.pairs()
    assert sorted(call.window() for call in calls) == [(-1, -1)] * 6 + [(-1, 0)] * 4
    assert all(max(call.q1 - call.q0, call.k1 - call.k0) <= terms for call in calls)
    assert kernel.calls((causal._replace(q1=terms, k1=terms),), plain=True) == [
        causal._replace(q1=terms, k1=terms)
    ]


def test_float32_in_short_sums_equals_dense(monkeypatch):
    monkeypatch.setattr(torch_efficient, "TERMS", 5)
    for shape in (Shape(17, 17, (-1, 0)), Shape(12, 17, (-1, -1)), Shape(17, 12, (3, 2))):
        check_tile(KERNELS["efficient"], shape, *inputs(shape, (4, 2)))


def test_bounds_are_made_once_per_schedule():
    flash_form._on_device.cache_clear()
    cu = (0, 3, 9, 10)
    problem = packed_problem("contiguous", "contiguous", [10], [10], cu, cu, True, (-1, -1))
    for seed in range(3):
        check_schedule(problem, seed, 1, KERNELS["flash"])
    assert flash_form._on_device.cache_info()[:2] == (5, 1)  # hits, misses


def test_cudnn_takes_dense_tiles_of_whole_blocks_without_a_window(aten, monkeypatch):
    monkeypatch.setattr(torch_cuda, "CUDNN_ROWS", 4)
    for shape, used in (
        (Shape(8, 8, (-1, 0)), True),
        (Shape(8, 12, (-1, -1)), True),
        (Shape(8, 12, (-1, 0)), False),
        (Shape(8, 8, (3, 0)), False),
        (Shape(3, 8, (-1, -1)), False),
        (Shape(6, 8, (-1, -1)), False),
        (Shape(8, 10, (-1, -1)), False),
        (Shape(6, 6, (-1, 0)), False),
    ):
        aten.calls.clear()
        check_tile(KERNELS["cudnn"], shape, *inputs(shape))
        assert all(("cudnn" in name) == used for name in aten.calls), (shape, aten.calls)


@pytest.mark.parametrize("column", [True, False])
def test_cudnn_gets_the_lse_as_it_gave_it(aten, column):
    """With a last dim of 1 or without: the schema does not say, and torch has changed it."""
    aten.cudnn_lse_column = column
    shape = Shape(8, 8, (-1, 0))
    check_tile(KERNELS["cudnn"], shape, *inputs(shape, (4, 2), (16, 16)))


def test_cudnn_gets_dense_tensors_whatever_the_strides_of_q_and_dout():
    """Its plans are kept by the strides of q, k and v: the stand-in refuses others."""
    shape = Shape(8, 8, (-1, 0))
    q, k, v, dout = inputs(shape, (4, 2), (8, 8))
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, dout)]
    for tensors in ([*strided[:3], dout], [q, k, v, strided[3]]):
        check_tile(KERNELS["cudnn"], shape, *tensors)
    check_tile(KERNELS["cudnn"], shape, q, k, v, torch.ones(1, 1, 1, 1).double().expand_as(dout))


def test_deterministic_switches_torch_for_the_call_alone(aten):
    shape = Shape(6, 6, (-1, 0))
    for deterministic in (True, False):
        problem = replace(PROBLEM, deterministic=deterministic)
        check_tile(FlashKernel("torch_cuda", AtenFlash(), problem), shape, *inputs(shape))
        assert aten.deterministic == deterministic
        assert not torch.are_deterministic_algorithms_enabled()
        check_tile(Efficient("torch_cuda", deterministic), shape, *inputs(shape))
        assert aten.splits == (1 if deterministic else None)


def prepared(**changes):
    problem = replace(PROBLEM, **changes)
    assert TorchCuda().supports(problem) is None
    return TorchCuda().prepared(problem)


def test_which_kernel_of_torch_computes_what():
    assert isinstance(prepared().library, AtenFlash)
    assert isinstance(prepared(compute_capability=(9, 0)).library, Cudnn)
    for changes in ({"head_dim": 192}, {"deterministic": True}):
        assert isinstance(prepared(compute_capability=(9, 0), **changes).library, AtenFlash)
    for changes in (
        {"dtype": torch.float32},
        {"dtype": torch.float16, "compute_capability": (7, 5)},
        {"dtype": torch.float16, "head_dim": 512},
        {"dtype": torch.float16, "head_dim": 256, "compute_capability": (8, 9)},
    ):
        assert isinstance(prepared(**changes), Efficient), changes
    for changes in (
        {"dtype": torch.float64},
        {"compute_capability": (7, 5)},
        {"softcap": True},
        {"alibi": True},
        {"bias": True},
        {"dropout": True},
    ):
        assert isinstance(prepared(**changes), ScoreBlocks), changes


def refusal(**changes):
    return TorchCuda().supports(replace(PROBLEM, **changes))


def test_what_it_refuses():
    assert "the tensors are on cpu" in refusal(device_type="cpu")
    assert "not in torch.float8_e5m2" in refusal(dtype=torch.float8_e5m2)
    for changes in ({"dtype": torch.float64}, {"bias": True}, {"dropout": True}):
        assert "no bitwise repeatability" in refusal(deterministic=True, **changes)
    assert refusal(deterministic=True) is None
    assert refusal(deterministic=True, dtype=torch.float32) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [(-1, -1), (7, 3)], ids=str)
def test_one_device_of_the_tests_on_a_gpu(aten, dtype, window):
    """What they compare ranks with: half precision by flash-attention, whatever the size."""
    q, k, v, dout = (x.to(dtype) for x in inputs(Shape(40, 40, window), (4, 2), (16, 16)))
    for causal in (True, False):
        options = {"causal": causal, "window_size": window}
        expected = dense_gradients(q, k, v, dout, **options)
        found = attend_on_gpu(q, k, v, dout, **options)
        for actual, wanted in zip(found, [expected[0], *expected[2:]], strict=True):
            assert_close_relative(actual.to(dtype), wanted, f"{options}")
    name = "_efficient" if dtype == torch.float32 else "_flash"
    assert all(call.startswith(name) for call in aten.calls)
    assert aten.calls or dtype == torch.float32
