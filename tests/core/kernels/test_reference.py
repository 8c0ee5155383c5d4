"""The reference kernel against the dense float64 oracle, and checks that every kernel shares."""

import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from nnscaler_ring.core.engine import attention_backward, attention_forward
from nnscaler_ring.core.exchange import GradientStep, Keys
from nnscaler_ring.core.kernels import AttentionKernel, BackwardTensors
from nnscaler_ring.core.kernels.reference import Reference
from nnscaler_ring.core.plan.tile import Tile, trim
from nnscaler_ring.core.scores.scores import Scores
from nnscaler_ring.core.sums.row_sum import RowSum
from tests.core.plan.test_schedule import random_problems
from tests.core.plan.test_tile import random_tile
from tests.oracle import dense_attention, dense_gradients, make_dout, make_qkv
from tests.tolerances import assert_close_float64, assert_close_relative

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HEADS = ((2, 2), (6, 2), (4, 1))
HEAD_DIMS = ((4, 4), (4, 2), (3, 7))  # of q and k, of v
SCALE = 0.3


class Shape(NamedTuple):
    """A tile as a kernel sees it."""

    nq: int
    nk: int
    window: tuple[int, int]


def shape_of(tile: Tile) -> Shape:
    return Shape(tile.q1 - tile.q0, tile.k1 - tile.k0, tile.window())


def random_shapes(seed: int, count: int, size: int) -> Iterator[Shape]:
    """Trimmed tiles with any band, more queries than keys and the other way round."""
    rng = random.Random(seed)
    for _ in range(count):
        if tile := trim(random_tile(rng, size)):
            yield shape_of(tile)


def scheduled_shapes(seed: int, count: int) -> set[Shape]:
    """The tiles of random schedules: every layout, mask and packing."""
    return {
        shape_of(tile)
        for problem in random_problems(seed, count, longest=12)
        for rank in problem.ranks
        for tile in problem.schedule.tiles(rank, list(problem.ranks))
    }


def inputs(
    shape: Shape, heads: tuple[int, int] = (2, 1), dims: tuple[int, int] = (4, 4), batch: int = 2
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, dout in float64, the same for the same shape."""
    seed = shape.nq * 1000 + shape.nk
    q, k, v = make_qkv(seed, batch, shape.nq, shape.nk, *heads, *dims)
    return q, k, v, make_dout(seed, q, v)


class OneDevice:
    """An exchange of a rank that has all keys: its tiles, and nothing to send."""

    def __init__(self, *tiles: Tile) -> None:
        self.tiles = tiles

    def steps(self, k: Tensor, v: Tensor) -> Iterator[Keys]:
        yield Keys(k, v, self.tiles, ((0, 0, k.shape[1]),))

    def gradient_steps(self, k: Tensor, v: Tensor) -> Iterator[GradientStep]:
        self.sums = RowSum(k), RowSum(v)
        yield GradientStep(k, v, self.tiles, ((0, 0, k.shape[1]),), *self.sums)

    def gradients(self) -> tuple[Tensor, Tensor]:
        dk, dv = self.sums
        return dk.current(), dv.current()


def tile_of(shape: Shape) -> Tile:
    tile = trim(Tile(0, shape.nq, 0, shape.nk, *_band(shape)))
    assert tile is not None, shape
    return tile


def check_tile(
    kernel: AttentionKernel,
    shape: Shape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    *,
    may_cancel: bool = False,
) -> None:
    """Forward and backward of one tile that is a whole attention, against the oracle.

    `may_cancel`: rows may see one key alone, so that their exact gradients are 0.
    """
    expected = dense_gradients(q, k, v, dout, softmax_scale=SCALE, window_size=shape.window)
    options = {"scores": Scores(SCALE), "kernel": kernel}
    one_device = OneDevice(tile_of(shape))
    out, lse = attention_forward(q, k, v, exchange=one_device, **options)
    tensors = BackwardTensors(dout, None, q, k, v, out, lse)
    grads = attention_backward(tensors, exchange=one_device, **options)[:3]
    names = ("out", "lse", "dq", "dk", "dv")
    for name, actual, wanted in zip(names, (out, lse, *grads), expected, strict=True):
        what = f"{name} of {kernel.name}, {shape}, {q.shape}, {k.shape}, {v.shape}"
        if q.dtype == torch.float64:
            assert_close_float64(actual, wanted, what)
        else:
            on_gpu = kernel.name if q.is_cuda else None
            floor = wanted.numel() ** 0.5 if may_cancel else 0.0
            assert_close_relative(actual.to(q.dtype), wanted, what, floor=floor, kernel=on_gpu)
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)


def check_shares(kernel: AttentionKernel, shape: Shape, cut: int) -> None:
    """Tiles of the keys before and after `cut`, with the global out and lse: sums are exact."""
    q, k, v, dout = inputs(shape)
    tile = tile_of(shape)
    expected = dense_gradients(q, k, v, dout, softmax_scale=SCALE, window_size=shape.window)
    out, lse = expected[:2]
    parts = [trim(tile._replace(k1=cut)), trim(tile._replace(k0=cut))]
    shares = OneDevice(*(part for part in parts if part))
    options = {"exchange": shares, "kernel": kernel, "scores": Scores(SCALE)}
    tensors = BackwardTensors(dout, None, q, k, v, out, lse)
    grads = attention_backward(tensors, **options)[:3]
    for name, actual, wanted in zip(("dq", "dk", "dv"), grads, expected[2:], strict=True):
        assert_close_float64(actual, wanted, f"{name} of {kernel.name}, {shape} cut at key {cut}")


def _band(shape: Shape) -> tuple[int, int]:
    left, right = shape.window
    diagonal = shape.nk - shape.nq
    full = shape.nq + shape.nk
    return (-full if left < 0 else diagonal - left), (full if right < 0 else diagonal + right)


def check_large_logits(kernel: AttentionKernel, dtype: torch.dtype) -> None:
    """Scores from -1e4 to 1e4: the softmax picks one key, nothing overflows, no NaN."""
    q = torch.ones(1, 6, 2, 4, dtype=dtype)
    levels = torch.tensor([-1e4, 1e4, 0.0, 5e3, -5e3, 1e4], dtype=dtype)
    k = (levels / 4).view(1, 6, 1, 1).expand(1, 6, 1, 4).contiguous()
    v = torch.arange(24, dtype=dtype).view(1, 6, 1, 4)
    dout = torch.ones(1, 6, 2, 4, dtype=dtype)
    one_device = OneDevice(tile_of(Shape(6, 6, (2, 1))))
    options = {"exchange": one_device, "kernel": kernel, "scores": Scores(1.0)}
    out, lse = attention_forward(q, k, v, **options)
    expected, expected_lse = dense_attention(q, k, v, softmax_scale=1.0, window_size=(2, 1))
    if dtype == torch.float64:
        assert_close_float64(out, expected, "out")
        assert_close_float64(lse, expected_lse, "lse")
    else:
        assert_close_relative(out.to(dtype), expected, "out")
        assert_close_relative(lse, expected_lse, "lse")
    tensors = BackwardTensors(dout, None, q, k, v, out, lse)
    grads = attention_backward(tensors, **options)[:3]
    assert all(bool(torch.isfinite(grad).all()) for grad in grads)


KERNEL = Reference()


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny calls on a busy machine: threads that wait for each other take 20 times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dims", HEAD_DIMS)
@pytest.mark.parametrize("heads", HEADS)
def test_random_tiles_equal_dense(heads, dims):
    for shape in random_shapes(1, 40, size=12):
        check_tile(KERNEL, shape, *inputs(shape, heads, dims))


def test_tiles_of_schedules_equal_dense():
    for shape in scheduled_shapes(2, 15):
        check_tile(KERNEL, shape, *inputs(shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype):
    for shape in (Shape(70, 70, (-1, 0)), Shape(64, 90, (-1, -1)), Shape(90, 64, (20, 30))):
        check_tile(KERNEL, shape, *(x.to(dtype) for x in inputs(shape, (6, 2), (16, 8))))


def test_gradients_of_two_tiles_sum_to_the_gradient():
    rng = random.Random(3)
    for shape in random_shapes(3, 60, size=10):
        check_shares(KERNEL, shape, rng.randint(0, shape.nk))


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_that_differ_by_ten_thousand(dtype):
    check_large_logits(KERNEL, dtype)
