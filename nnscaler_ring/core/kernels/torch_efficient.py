"""torch's memory-efficient CUDA attention, for what its flash kernel does not take: float32.

Contract (torch 2.13): tensors are [b, rows, h, d], with as many heads in k and v as in q; v may
have its own head dim; causal is aligned at the top left corner (mask type 1); softmax_lse has its
rows padded to a multiple of 32. Not yet run on a GPU.

Note [Sums of TF32 products]
    The kernel takes a float32 product apart into three of TF32 (`OpMultiplyAddFastF32` in torch's
    kernel headers) and sums them in tensor cores, which cut off every partial sum: an error that
    grows with the terms, 4e-5 at 4,096 keys and 16 times that at 65,536 in an emulation. So tiles
    are cut, and what they give is merged and summed with rounding. Short tiles also keep the
    kernel's offsets of keys, rows times stride, within its 32 bits.

    Source: Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores while
    surpassing the FP32 theoretical peak performance", arXiv 2203.03341.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nnscaler_ring.core.kernels.contract import BackwardTensors, TileGradients
from nnscaler_ring.core.kernels.cuts import fused_calls, is_top_left_causal, score_blocks
from nnscaler_ring.core.kernels.head_dims import (
    aligned,
    round_up,
    to_head_dim,
    with_lse_columns,
)
from nnscaler_ring.core.kernels.tile_math import (
    repeat_kv_heads,
    sum_kv_heads,
    tile_backward,
    tile_forward,
)
from nnscaler_ring.core.plan.tile import KernelCall, Tile
from nnscaler_ring.core.scores.scores import TileScores

aten = torch.ops.aten

LSE_MULTIPLE = 32
FULL, TOP_LEFT_CAUSAL = 0, 1
TERMS = 4096
"""Rows and keys of a tile at most: Note [Sums of TF32 products]."""


@dataclass(frozen=True)
class Efficient:
    """Memory O(rows), and k and v repeated for grouped heads; small bands in plain torch."""

    name: str
    deterministic: bool

    def calls(self, tiles: Sequence[Tile], *, plain: bool) -> Sequence[KernelCall]:
        """Full, causal and small banded blocks: Note [A band in fused calls] in cuts.py."""
        return [
            call
            for tile in tiles
            for block in score_blocks(tile, TERMS, TERMS)
            for call in fused_calls(block)
        ]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: TileScores) -> tuple[Tensor, Tensor]:
        """One call of the kernel, or one small block of scores."""
        assert scores.segments is None and scores.mods is None, scores
        nq, nk, v_head_dim = q.shape[1], k.shape[1], v.shape[-1]
        mask = _mask_type(nq, nk, scores.window)
        if mask is None:
            return tile_forward(q, k, v, scores)
        q, k, v = _to_kernel(q, k, v)
        out, softmax_lse, *_ = aten._efficient_attention_forward(
            q, k, v, None, None, None, nq, nk, 0.0, mask, True, scale=scores.softmax_scale
        )
        return out[..., :v_head_dim], softmax_lse[..., :nq]

    def backward(self, tensors: BackwardTensors, scores: TileScores) -> TileGradients:
        """The backward of the same."""
        assert scores.segments is None and scores.mods is None, scores
        dout, dlse, q, k, v, out, softmax_lse = tensors
        nq, nk, num_kv_heads = q.shape[1], k.shape[1], k.shape[2]
        dims = q.shape[-1], k.shape[-1], v.shape[-1]
        mask = _mask_type(nq, nk, scores.window)
        if mask is None:
            return tile_backward(tensors, scores)
        if dlse is not None:
            dout, v, out = with_lse_columns(dout, v, out, dlse)
        q, k, v = _to_kernel(q, k, v)
        dout, out = to_head_dim(v.shape[-1], dout, out)
        dout, out = aligned(dout), aligned(out.contiguous())  # it knows no stride of out's rows
        padding = round_up(nq, LSE_MULTIPLE) - nq
        no_dropout = q.new_empty((), dtype=torch.int64)
        dq, dk, dv, _ = aten._efficient_attention_backward(
            dout,
            q,
            k,
            v,
            None,
            out,
            None,
            None,
            nq,
            nk,
            F.pad(softmax_lse, (0, padding), value=torch.inf).contiguous(),
            0.0,
            no_dropout,
            no_dropout,
            mask,
            False,
            scale=scores.softmax_scale,
            # Sums over several splits of the keys come in any order.
            num_splits_key=1 if self.deterministic else None,
        )
        dk, dv = sum_kv_heads(dk, num_kv_heads), sum_kv_heads(dv, num_kv_heads)
        return TileGradients(*(x[..., :dim] for x, dim in zip((dq, dk, dv), dims, strict=True)))


def _mask_type(nq: int, nk: int, window: tuple[int, int]) -> int | None:
    """How the kernel masks such a call; None if it does not know how."""
    if window == (-1, -1):
        return FULL
    return TOP_LEFT_CAUSAL if is_top_left_causal(nq, nk, window) else None


def _to_kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Aligned, with head dims that are a multiple of 8, and as many heads in k and v as in q."""
    q, k = to_head_dim(round_up(q.shape[-1], 8), q, k)
    (v,) = to_head_dim(round_up(v.shape[-1], 8), v)
    k, v = repeat_kv_heads(k, q.shape[2]), repeat_kv_heads(v, q.shape[2])
    return aligned(q), aligned(k), aligned(v)
