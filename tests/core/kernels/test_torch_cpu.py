"""The fused CPU kernel: its calls painted, its numbers against dense float64."""

import random

import pytest
import torch
from torch import Tensor

from nnscaler_ring.core.kernels import BackwardTensors, cuts, torch_cpu
from nnscaler_ring.core.kernels.cuts import BLOCK_ROWS, fused_calls
from nnscaler_ring.core.kernels.torch_cpu import TorchCpu
from nnscaler_ring.core.plan.tile import Tile
from nnscaler_ring.core.scores.scores import TileScores
from tests.core.kernels.test_reference import (
    DTYPES,
    HEAD_DIMS,
    HEADS,
    Shape,
    check_large_logits,
    check_shares,
    check_tile,
    inputs,
    one_thread,  # noqa: F401
    random_shapes,
    scheduled_shapes,
    tile_of,
)

KERNEL = TorchCpu()


@pytest.fixture(params=[2, 8])
def small_blocks(request, monkeypatch):
    """Blocks of few rows, so that small tiles are cut too."""
    monkeypatch.setattr(cuts, "BLOCK_ROWS", request.param)
    fused_calls.cache_clear()
    yield request.param
    fused_calls.cache_clear()


def seen(shape: Shape) -> Tensor:
    """Which row sees which key, from the definition of the window."""
    distance = torch.arange(shape.nk) - (torch.arange(shape.nq) + shape.nk - shape.nq).unsqueeze(1)
    left, right = shape.window
    visible = torch.ones(shape.nq, shape.nk, dtype=torch.bool)
    if left >= 0:
        visible &= distance >= -left
    if right >= 0:
        visible &= distance <= right
    return visible


def check_calls(shape: Shape, block_rows: int) -> None:
    """Each visible pair in exactly one call; no row of a call sees nothing; masks are small."""
    painted = torch.zeros(shape.nq, shape.nk, dtype=torch.int32)
    for call in fused_calls(tile_of(shape)):
        rows, keys = call.q1 - call.q0, call.k1 - call.k0
        assert rows > 0 and keys > 0, f"the fused kernel dies of empty tensors: {call}"
        inside = seen_by_kernel(call)
        if is_masked(call):
            # Both corners of a block and the keys between them, at most two blocks of each.
            assert rows <= block_rows and keys <= 4 * block_rows, (shape, call)
        assert bool(inside.any(1).all()), f"a row of a call sees nothing: {shape}, {call}"
        painted[call.q, call.k] += inside
    assert torch.equal(painted, seen(shape).int()), shape


def seen_by_kernel(call: Tile) -> Tensor:
    """What the fused kernel does with a call: top-left causal, the additive mask, or all."""
    rows, keys = call.q1 - call.q0, call.k1 - call.k0
    is_causal, mask = _masking_of(call)
    assert not is_causal or mask is None, call
    inside = torch.ones(rows, keys, dtype=torch.bool)
    if is_causal:
        return inside.tril()
    if mask is None:
        return inside
    assert set(mask.unique().tolist()) <= {0.0, -torch.inf}
    return mask == 0


def is_masked(call: Tile) -> bool:
    return _masking_of(call)[1] is not None


def _masking_of(call: Tile) -> tuple[bool, Tensor | None]:
    q, k = torch.empty(1, call.q1 - call.q0, 1, 1), torch.empty(1, call.k1 - call.k0, 1, 1)
    return torch_cpu._masking(q, k, call.window())


def test_calls_hold_each_pair_once(small_blocks):
    shapes = {*random_shapes(1, 1000, size=30), *scheduled_shapes(1, 60)}
    for shape in shapes:
        check_calls(shape, small_blocks)


@pytest.mark.parametrize("rows", [1, BLOCK_ROWS - 1, BLOCK_ROWS, BLOCK_ROWS + 1, 600])
def test_calls_hold_each_pair_once_at_full_block_size(rows):
    for extra in (0, 1, 300, 1000):
        for window in ((-1, 0), (-1, -1), (0, 0), (5, 2), (300, 0), (700, 600), (40, -1), (-1, 40)):
            left, right = window
            keys = rows + extra
            # A tile without rows or keys that see nothing, as trim leaves them.
            if (left >= 0 and left < extra) or keys - 1 < right:
                continue
            check_calls(Shape(rows, keys, window), BLOCK_ROWS)


def test_usual_tiles_are_one_call():
    for shape in (
        Shape(1000, 1000, (-1, 0)),
        Shape(1000, 3000, (-1, -1)),
        Shape(3000, 1000, (-1, -1)),
    ):
        assert fused_calls(tile_of(shape)) == (tile_of(shape),)


def test_a_causal_tile_with_earlier_keys_is_a_full_and_a_causal_call():
    full, causal = fused_calls(tile_of(Shape(1000, 3000, (-1, 0))))
    assert full[:4] == (0, 1000, 0, 2000) and _masking_of(full) == (False, None)
    assert causal[:4] == (0, 1000, 2000, 3000) and _masking_of(causal) == (True, None)


def test_a_wide_band_masks_its_corners_only():
    """Keys that all rows of a block see go without a mask, however many there are."""
    tile = tile_of(Shape(2048, 2048, (1500, 0)))
    calls = [call for call in fused_calls(tile) if call.q0 >= 1536]
    masked = [call for call in calls if is_masked(call)]
    assert masked and len(masked) < len(calls)
    for call in masked:
        assert call.k1 - call.k0 <= BLOCK_ROWS


@pytest.mark.parametrize("dims", HEAD_DIMS)
@pytest.mark.parametrize("heads", HEADS)
def test_random_tiles_equal_dense(heads, dims):
    for shape in random_shapes(2, 40, size=12):
        check_tile(KERNEL, shape, *inputs(shape, heads, dims))


def test_tiles_of_schedules_equal_dense(small_blocks):
    for shape in scheduled_shapes(3, 12):
        check_tile(KERNEL, shape, *inputs(shape))


def test_random_bands_in_small_blocks_equal_dense(small_blocks):
    for shape in random_shapes(4, 60, size=24):
        check_tile(KERNEL, shape, *inputs(shape, (4, 2), (4, 2)))


@pytest.mark.parametrize("rows", [BLOCK_ROWS - 1, BLOCK_ROWS, BLOCK_ROWS + 1, 600])
@pytest.mark.parametrize("window", [(-1, 0), (100, 0), (50, 60), (520, -1), (0, 0)], ids=str)
def test_sizes_around_a_block_equal_dense(rows, window):
    if max(window) >= rows:
        window = tuple(min(side, rows - 1) for side in window)
    shape = Shape(rows, rows, window)
    check_tile(KERNEL, shape, *inputs(shape, (1, 1), batch=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(70, 70, (-1, 0)),
        Shape(64, 90, (-1, -1)),
        Shape(90, 64, (20, 30)),
        Shape(300, 300, (60, 0)),
        Shape(40, 100, (-1, 0)),
    ],
    ids=str,
)
def test_every_dtype(shape, dtype):
    for heads, dims in (((6, 2), (16, 8)), ((2, 2), (8, 24))):
        check_tile(KERNEL, shape, *(x.to(dtype) for x in inputs(shape, heads, dims)))


def test_gradients_of_two_tiles_sum_to_the_gradient(small_blocks):
    rng = random.Random(5)
    for shape in random_shapes(5, 40, size=14):
        check_shares(KERNEL, shape, rng.randint(0, shape.nk))


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_that_differ_by_ten_thousand(dtype):
    check_large_logits(KERNEL, dtype)


def test_merging_calls_whose_logits_differ_by_ten_thousand(small_blocks):
    check_large_logits(KERNEL, torch.float64)


# Strides: the fused kernel takes any but a last dim that is not dense, where it is wrong silently.


def last_dim_not_dense(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def every_second_channel(x: Tensor) -> Tensor:
    return torch.stack((x, torch.full_like(x, 7.0)), dim=-1).flatten(-2)[..., ::2]


def heads_before_rows(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def slice_of_a_wider_tensor(x: Tensor) -> Tensor:
    return torch.cat((x + 9, x, x - 9), dim=2)[:, :, x.shape[2] : 2 * x.shape[2]]


def rows_of_a_longer_tensor(x: Tensor) -> Tensor:
    return torch.cat((x[:, :1] + 9, x, x[:, :1]), dim=1)[:, 1:-1]


STRIDES = (
    last_dim_not_dense,
    every_second_channel,
    heads_before_rows,
    slice_of_a_wider_tensor,
    rows_of_a_longer_tensor,
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dims", [(4, 4), (4, 2), (2, 4)], ids=str)
@pytest.mark.parametrize("strided", STRIDES, ids=lambda f: f.__name__)
def test_strided_inputs(small_blocks, strided, dims, dtype):
    for shape in (Shape(12, 12, (-1, 0)), Shape(20, 26, (10, 5))):
        tensors = [x.to(dtype) for x in inputs(shape, (4, 2), dims, batch=1)]
        for n in range(4):
            mixed = [strided(x) if m == n else x for m, x in enumerate(tensors)]
            assert torch.equal(mixed[n], tensors[n])
            check_tile(KERNEL, shape, *mixed)
        check_tile(KERNEL, shape, *map(strided, tensors))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_slices_of_a_packed_qkv(dtype):
    shape = Shape(40, 40, (12, 0))
    qkv = torch.randn(2, 40, 3, 2, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    q, k, v = qkv.unbind(2)
    check_tile(KERNEL, shape, q, k, v, inputs(shape, (2, 2), (8, 8))[3].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [(-1, 0), (12, 0)], ids=str)
def test_the_expanded_gradient_of_a_sum(dtype, window):
    """`out.sum().backward()` passes one number with all strides 0."""
    shape = Shape(40, 40, window)
    q, k, v, dout = (x.to(dtype) for x in inputs(shape, (2, 1), (8, 8)))
    ones = torch.ones((), dtype=dtype).expand(dout.shape)
    assert set(ones.stride()) == {0}
    check_tile(KERNEL, shape, q, k, v, ones)


def test_gradients_are_fresh_tensors():
    """The engine keeps them and adds to them: they must not share memory with an input."""
    for shape in (Shape(20, 20, (-1, 0)), Shape(20, 20, (3, 0)), Shape(1, 1, (-1, -1))):
        for dims in HEAD_DIMS:
            q, k, v, dout = inputs(shape, (2, 1), dims)
            scores = TileScores(1.0, shape.window)
            out, lse = KERNEL.forward(q, k, v, scores)
            grads = KERNEL.backward(BackwardTensors(dout, None, q, k, v, out, lse), scores)[:3]
            memory = {x.untyped_storage().data_ptr() for x in (q, k, v, dout, out, lse)}
            fresh = {x.untyped_storage().data_ptr() for x in grads}
            assert len(fresh) == 3 and not memory & fresh
