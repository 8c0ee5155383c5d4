"""PyTorch's fused CPU attention, forward and backward, on strided views without copies.

Contract of the aten pair (torch 2.13): tensors are [b, h, rows, d]; `is_causal` is **top-left**
aligned and allows more queries than keys; v has q's head dim; zero rows kill the process; a last
dim that is not dense gives wrong numbers without an error; a float mask is allowed, a band is not.

Note [Rows of NaN]
    The kernel's search for the largest score drops NaN among keys that do not fill a vector
    register. Of a query that is NaN in all its scores it then says that it sees no key: out = 0,
    softmax_lse = 0. So where few keys give a softmax_lse of 0, which hardly any other row has, the
    call is computed again in plain torch, and NaN stays NaN for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from nnscaler_ring.core.kernels.contract import (
    AttentionKernel,
    BackwardTensors,
    Problem,
    TileGradients,
)
from nnscaler_ring.core.kernels.cuts import banded_tile, fused_calls, score_blocks
from nnscaler_ring.core.kernels.head_dims import to_head_dim, with_lse_columns
from nnscaler_ring.core.kernels.tile_math import tile_backward, tile_forward
from nnscaler_ring.core.plan.tile import UNBOUNDED, KernelCall, Tile
from nnscaler_ring.core.scores.scores import TileScores

aten = torch.ops.aten

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FULL_BLOCK_ROWS = 768
"""Below, the fused backward rounds dk and dv to half precision every 64 query rows instead of every
256: in float32 such calls are exact enough for any number of ranks, and faster up to 256 rows."""


VECTOR = 16
"""float32 numbers of the widest register: Note [Rows of NaN]."""

SCORE_BLOCK = (256, 1024)
"""Rows and keys whose scores are built at a time: what the fused kernel cannot do."""


class TorchCpu:
    """Memory O(rows); the usual causal and full tiles are one fused call each.

    Softcap, ALiBi, bias and dropout, which the fused kernel does not have, are computed in blocks.
    """

    name = "torch_cpu"

    def supports(self, problem: Problem) -> str | None:
        """CPU tensors of any floating dtype; results are the same bits in every run."""
        if problem.device_type != "cpu":
            return f"it computes on cpu, the tensors are on {problem.device_type}"
        if problem.dtype not in DTYPES:
            return f"it computes in {', '.join(map(str, DTYPES))}, not in {problem.dtype}"
        return None

    def prepared(self, problem: Problem) -> AttentionKernel:
        """The same for every call."""
        return self

    def calls(self, tiles: Sequence[Tile], *, plain: bool) -> Sequence[KernelCall]:
        """Full, causal and small masked blocks: Note [A band in fused calls] in cuts.py."""
        if plain:
            return [call for tile in tiles for call in fused_calls(tile)]
        return [call for tile in tiles for call in score_blocks(tile, *SCORE_BLOCK)]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: TileScores) -> tuple[Tensor, Tensor]:
        """One call of the fused kernel, or one block of scores: Note [Rows of NaN] too."""
        if scores.mods is not None:
            return tile_forward(q, k, v, scores)
        v_head_dim = v.shape[-1]
        is_causal, mask = _masking(q, k, scores.window)
        out, softmax_lse = aten._scaled_dot_product_flash_attention_for_cpu(
            *(x.transpose(1, 2) for x in _to_kernel(q, k, v)),
            0.0,
            is_causal,
            attn_mask=mask,
            scale=scores.softmax_scale,
        )
        out = out.transpose(1, 2)[..., :v_head_dim]
        if k.shape[1] < VECTOR and bool((softmax_lse == 0).any()):
            right_out, right_lse = tile_forward(q, k, v, scores)
            is_lost = right_lse.isnan()
            softmax_lse = torch.where(is_lost, right_lse, softmax_lse)
            out = torch.where(is_lost.transpose(1, 2).unsqueeze(-1), right_out.to(out.dtype), out)
        return out, softmax_lse

    def backward(self, tensors: BackwardTensors, scores: TileScores) -> TileGradients:
        """The backward of the same, in float32 where half precision is coarser."""
        if scores.mods is not None:
            return tile_backward(tensors, scores)
        dout, dlse, q, k, v, out, softmax_lse = tensors
        v_head_dim = v.shape[-1]
        if q.shape[1] < FULL_BLOCK_ROWS or dlse is not None:
            dout, q, k, v, out = (x.to(softmax_lse.dtype) for x in (dout, q, k, v, out))
        if dlse is not None:
            dout, v, out = with_lse_columns(dout, v, out, dlse)
        is_causal, mask = _masking(q, k, scores.window)
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(x.transpose(1, 2) for x in _to_kernel(dout, q, k, v, out)),
            softmax_lse,
            0.0,
            is_causal,
            attn_mask=mask,
            scale=scores.softmax_scale,
        )
        dims = (q.shape[-1], k.shape[-1], v_head_dim)
        dq, dk, dv = (
            gradient.transpose(1, 2)[..., :dim]
            for gradient, dim in zip(gradients, dims, strict=True)
        )
        return TileGradients(dq, dk, dv)


def _masking(q: Tensor, k: Tensor, window: tuple[int, int]) -> tuple[bool, Tensor | None]:
    """(is_causal, attn_mask) of one call."""
    if window == (-1, -1):
        return False, None
    _, nq, _, nk, lo, hi = banded_tile(q.shape[1], k.shape[1], window)
    if lo == -UNBOUNDED and hi == 0:
        return True, None
    return False, _band_mask(nq, nk, lo, hi, q.dtype)


@lru_cache(maxsize=16)
def _band_mask(nq: int, nk: int, lo: int, hi: int, dtype: torch.dtype) -> Tensor:
    """0 where `lo <= j - i <= hi`, else -inf: [nq, nk], the same for all inner blocks of a band."""
    distance = torch.arange(nk) - torch.arange(nq).unsqueeze(1)
    mask = torch.zeros(nq, nk, dtype=dtype)
    return mask.masked_fill_((distance < lo) | (distance > hi), -torch.inf)


def _to_kernel(*tensors: Tensor) -> tuple[Tensor, ...]:
    return to_head_dim(max(x.shape[-1] for x in tensors), *tensors)
