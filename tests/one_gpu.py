"""One device as ranks are compared with it on a GPU: one kernel of torch, on the whole sequence."""

import torch
from torch import Tensor

from nnscaler_ring.core.engine import attention_backward, attention_forward
from nnscaler_ring.core.kernels import AttentionKernel, BackwardTensors, Problem
from nnscaler_ring.core.kernels.aten_flash import AtenFlash
from nnscaler_ring.core.kernels.flash_form import FlashKernel
from nnscaler_ring.core.kernels.torch_efficient import Efficient
from nnscaler_ring.core.scores.scores import Scores
from tests.core.kernels.test_reference import OneDevice, Shape, tile_of


def attend_on_gpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    *,
    causal: bool,
    window_size: tuple[int, int] = (-1, -1),
    scale: float | None = None,
) -> list[Tensor]:
    """out, dq, dk, dv of [b, n, h, d]: flash-attention 2, in float32 the memory-efficient kernel.

    `scaled_dot_product_attention` would choose among kernels that err differently: cuDNN sums the
    gradients of grouped heads in float32, flash-attention in half precision, and float32 with
    grouped heads goes to plain matrix products.
    """
    left, right = window_size
    tile = tile_of(Shape(q.shape[1], k.shape[1], (left, 0 if causal else right)))
    options = {
        "exchange": OneDevice(tile),
        "kernel": _kernel(q),
        "scores": Scores(q.shape[-1] ** -0.5 if scale is None else scale),
    }
    out, lse = attention_forward(q, k, v, **options)
    return [out, *attention_backward(BackwardTensors(dout, None, q, k, v, out, lse), **options)[:3]]


def _kernel(q: Tensor) -> AttentionKernel:
    if q.dtype == torch.float32:
        return Efficient("memory-efficient", deterministic=False)
    *_, heads, head_dim = q.shape
    problem = Problem("cuda", q.dtype, heads, heads, head_dim, head_dim)
    return FlashKernel("flash-attention 2", AtenFlash(), problem)
