"""Scales of 0 and below, and NaN: the same on any number of ranks as the formula says."""

import math

import pytest
import torch
from torch import Tensor

from nnscaler_ring import wrap_dilated_attn_func, wrap_ring_attn_func, wrap_ring_attn_varlen_func
from nnscaler_ring.core.kernels import KERNELS, BackwardTensors
from nnscaler_ring.core.kernels.scale_sign import for_scale
from nnscaler_ring.core.kernels.torch_cpu import TorchCpu
from nnscaler_ring.core.scores.scores import TileScores
from tests.oracle import dense_attention, dense_gradients, make_dout, make_qkv
from tests.tolerances import assert_close_float64

SCALES = (-0.7, -1e-3, 0.0)
KERNELS_HERE = ("torch_cpu", "reference")
TOKENS, HEADS, KV_HEADS, DIM = 13, 6, 2, 4
LENS = [6, 0, 7]


def shards(*tensors: Tensor) -> list[list[Tensor]]:
    return [list(x.split(LENS, dim=1)) for x in tensors]


def with_gradients(ranks: list[int], scale: float, kernel: str, tensors: list[list[Tensor]]):
    """out, lse, dq, dk, dv of this rank's shard."""
    block = ranks.index(torch.distributed.get_rank())
    q, k, v, dout = (x[block] for x in tensors)
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out, lse = wrap_ring_attn_func(
        q,
        k,
        v,
        scale,
        process_group=ranks,
        shard_lens=LENS,
        kernel=kernel,
        return_lse=True,
    )
    return out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), dout)


@pytest.mark.parametrize("kernel", KERNELS_HERE)
@pytest.mark.parametrize("scale", SCALES)
def test_scales_that_are_not_above_0(pool, scale, kernel):
    q, k, v = make_qkv(3, 1, TOKENS, TOKENS, HEADS, KV_HEADS, DIM)
    dout = make_dout(3, q, v)
    expected = dense_gradients(q, k, v, dout, causal=True, softmax_scale=scale)
    found = pool.run(3, with_gradients, scale, kernel, shards(q, k, v, dout))
    for n, (name, right) in enumerate(zip(("out", "lse", "dq", "dk", "dv"), expected, strict=True)):
        whole = torch.cat([rank[n] for rank in found], dim=2 if name == "lse" else 1)
        assert_close_float64(whole, right, name)


def test_a_scale_below_0_with_every_option():
    """Softcap, ALiBi and bias come after the scale."""
    q, k, v = make_qkv(4, 1, TOKENS, TOKENS, HEADS, KV_HEADS, DIM)
    bias, slopes = torch.randn(1, HEADS, TOKENS, TOKENS).double(), torch.rand(HEADS).double()
    options = {"softcap": 1.5, "bias": bias, "alibi_slopes": slopes, "return_lse": True}
    one = wrap_ring_attn_func(q, k, v, -0.7, kernel="torch_cpu", **options)
    other = wrap_ring_attn_func(-q, k, v, 0.7, kernel="reference", **options)
    for found, right in zip(one, other, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", SCALES)
def test_dilated_attention_with_such_scales(scale):
    q, k, v = (x.requires_grad_() for x in make_qkv(5, 1, 12, 12, 2, 2, DIM))
    results = []
    for kernel in KERNELS_HERE:
        out = wrap_dilated_attn_func(q, k, v, [4, 12], [1, 3], scale, kernel=kernel)
        results.append((out, *torch.autograd.grad(out.sum(), (q, k, v))))
    for found, right in zip(*results, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


def test_kernels_get_a_scale_above_0():
    given: list[float] = []

    class Kernel(TorchCpu):
        def forward(self, q, k, v, scores):
            given.append(scores.softmax_scale)
            return super().forward(q, k, v, scores)

        def backward(self, tensors, scores):
            given.append(scores.softmax_scale)
            return super().backward(tensors, scores)

    kernel = Kernel()
    assert for_scale(kernel, 0.5) is kernel
    q, k, v = make_qkv(6, 1, 3, 3, 2, 2, DIM)
    for scale in SCALES:
        wrapped = for_scale(kernel, scale)
        results = wrapped.forward(q, k, v, TileScores(scale))
        wrapped.backward(BackwardTensors(q, None, q, k, v, *results), TileScores(scale))
    assert min(given) > 0 and wrapped.name == kernel.name


NAN_DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", NAN_DTYPES, ids=str)
@pytest.mark.parametrize("keys", [*range(1, 18), 40])
@pytest.mark.parametrize("causal", [True, False])
def test_a_query_of_nan_stays_nan(dtype, keys, causal):
    """However few keys a tile has; and its neighbours are what they are without it."""
    q, k, v = make_qkv(7, 1, keys, keys, 2, 1, DIM, dtype=dtype)
    spoilt = q.clone()
    spoilt[0, -1, 1, 0] = math.nan
    spoilt.requires_grad_()
    out, lse = wrap_ring_attn_func(spoilt, k, v, causal=causal, return_lse=True)
    right = wrap_ring_attn_func(q, k, v, causal=causal)
    assert out[0, -1, 1].isnan().all() and lse[0, 1, -1].isnan()
    assert torch.equal(out[:, :-1], right[:, :-1]) and torch.equal(out[0, -1, 0], right[0, -1, 0])
    (dq,) = torch.autograd.grad(out[0, -1].sum(), spoilt)
    assert dq[0, -1, 1].isnan().all()


def test_infinite_queries_of_no_direction_are_nan():
    q, k, v = (torch.ones(1, 3, 1, 2) for _ in range(3))
    q[0, 1, 0] = torch.tensor([math.inf, -math.inf])
    out = wrap_ring_attn_func(q, k, v, causal=False)
    assert out[0, 1].isnan().all() and not out[0, ::2].isnan().any()


def test_a_score_of_0_is_no_nan():
    q, k, v = torch.zeros(1, 5, 1, 2), torch.randn(1, 5, 1, 2), torch.randn(1, 5, 1, 2)
    out, lse = wrap_ring_attn_func(q, k, v, return_lse=True)
    right, right_lse = dense_attention(q, k, v, causal=True)
    torch.testing.assert_close(out.double(), right, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse.double(), right_lse, rtol=1e-6, atol=1e-6)


def spoilt_rows(ranks: list[int], name: str, tensors: list[list[Tensor]], bounds: list[int]):
    """Which rows and heads of this rank's out are NaN."""
    block = ranks.index(torch.distributed.get_rank())
    q, k, v = (x[block] for x in tensors)
    cu = torch.tensor(bounds, dtype=torch.int32)
    out = wrap_ring_attn_varlen_func(
        q, k, v, cu, cu, causal=True, process_group=ranks, shard_lens=LENS
    )
    return out.isnan().any(-1)


@pytest.mark.parametrize("name", ["k", "v"])
def test_nan_in_a_key_stays_in_its_document_and_head(pool, name):
    """Every row that sees it is NaN; of its document's earlier rows some may be; no others."""
    bounds, at = [0, 3, 10, TOKENS], 7
    q, k, v = make_qkv(8, None, TOKENS, TOKENS, 4, 2, DIM)
    {"k": k, "v": v}[name][at, 1, 0] = math.nan
    parts = [list(x.split(LENS)) for x in (q, k, v)]
    spoilt = torch.cat(pool.run(3, spoilt_rows, name, parts, bounds))
    assert spoilt[at:10, 2:].all()  # query heads 2 and 3 share KV head 1
    assert not spoilt[:3].any() and not spoilt[10:].any() and not spoilt[:, :2].any()


def test_the_kernels_that_are_tried_here_are_known():
    assert set(KERNELS_HERE) <= set(KERNELS)
