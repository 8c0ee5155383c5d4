"""PyTorch's fused CPU attention, forward and backward, on strided views without copies.

Contract of the aten pair (torch 2.13): tensors are [b, h, rows, d]; `is_causal` is **top-left**
aligned and allows more queries than keys; v has q's head dim; zero rows kill the process; a last
dim that is not dense gives wrong numbers without an error; a float mask is allowed, a band is not.

Note [A band in fused calls]
    A causal tile that starts `hi` keys early is a full block and a causal one. Any other band is
    cut into blocks of query rows; within a block the keys that all its rows see are one full call,
    and only the corners at the edges need a mask, at most a few blocks wide.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nnscaler_ring.core.kernels import Problem
from nnscaler_ring.core.online_softmax import PartialOutput
from nnscaler_ring.core.row_sum import RowSum
from nnscaler_ring.core.tile import UNBOUNDED, Tile, trim

aten = torch.ops.aten

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BLOCK_ROWS = 256
"""Query rows of a block of a band: the fused kernel runs at a fraction of its rate below that."""


class FusedCall(NamedTuple):
    """One call of the fused kernel: the rows and keys of `tile`; at most one of the two masks."""

    tile: Tile
    is_causal: bool
    masked: bool


class TorchCpu:
    """Memory O(rows); the usual causal and full tiles are one fused call each."""

    name = "torch_cpu"

    def supports(self, problem: Problem) -> str | None:
        """CPU tensors of any floating dtype; results are the same bits in every run."""
        if problem.device_type != "cpu":
            return f"it computes on cpu, the tensors are on {problem.device_type}"
        if problem.dtype not in DTYPES:
            return f"it computes in {', '.join(map(str, DTYPES))}, not in {problem.dtype}"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, window: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """One fused call, or the merge of a few."""
        v_head_dim = v.shape[-1]
        q, k, v = _to_kernel(q, k, v)
        partial = PartialOutput(q, q.shape[-1])
        for call in fused_calls(q.shape[1], k.shape[1], window):
            tile = call.tile
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, tile.q].transpose(1, 2),
                k[:, tile.k].transpose(1, 2),
                v[:, tile.k].transpose(1, 2),
                0.0,
                call.is_causal,
                attn_mask=_mask(call, q.dtype),
                scale=softmax_scale,
            )
            partial.merge_(tile.q, out.transpose(1, 2), lse)
        out, softmax_lse = partial.current()
        return out[..., :v_head_dim], softmax_lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        *,
        softmax_scale: float,
        window: tuple[int, int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same calls as the forward; several calls' gradients are summed in float32."""
        head_dims = q.shape[-1], k.shape[-1], v.shape[-1]
        dout, q, k, v, out = _to_kernel(dout, q, k, v, out)
        sums = RowSum(q), RowSum(k), RowSum(v)
        for call in fused_calls(q.shape[1], k.shape[1], window):
            tile = call.tile
            dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dout[:, tile.q].transpose(1, 2),
                q[:, tile.q].transpose(1, 2),
                k[:, tile.k].transpose(1, 2),
                v[:, tile.k].transpose(1, 2),
                out[:, tile.q].transpose(1, 2),
                softmax_lse[..., tile.q],
                0.0,
                call.is_causal,
                attn_mask=_mask(call, q.dtype),
                scale=softmax_scale,
            )
            for total, rows, block in zip(
                sums, (tile.q, tile.k, tile.k), (dq, dk, dv), strict=True
            ):
                total.take_(rows, block.transpose(1, 2))
        dq, dk, dv = (
            total.current()[..., :dim] for total, dim in zip(sums, head_dims, strict=True)
        )
        return dq, dk, dv


@lru_cache(maxsize=1024)
def fused_calls(nq: int, nk: int, window: tuple[int, int]) -> tuple[FusedCall, ...]:
    """The fused calls that together compute a tile, each visible pair in exactly one of them.

    Args:
        nq: query rows of the tile, at least 1.
        nk: keys of the tile, at least 1.
        window: the tile's band, bottom-right aligned, -1 for unbounded.
    """
    left, right = window
    lo = -UNBOUNDED if left < 0 else nk - nq - left
    hi = UNBOUNDED if right < 0 else nk - nq + right
    tile = trim(Tile(0, nq, 0, nk, lo, hi))
    return tuple(_calls(tile)) if tile else ()


def _calls(tile: Tile) -> Iterator[FusedCall]:
    q0, q1, k0, k1, lo, hi = tile
    if lo == -UNBOUNDED:
        yield from _causal_calls(tile)
        return
    # Note [A band in fused calls].
    for start in range(q0, q1, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, q1)
        block = Tile(start, stop, k0, k1, lo, hi)
        seen_by_all = max(k0, stop - 1 + lo), min(k1, start + hi + 1)
        if seen_by_all[1] - seen_by_all[0] <= 2 * BLOCK_ROWS:
            if box := trim(block):
                yield _masked_call(box)
            continue
        if corner := trim(block._replace(k1=seen_by_all[0])):
            yield _masked_call(corner)
        if rest := trim(block._replace(k0=seen_by_all[0])):
            yield from _causal_calls(rest)


def _causal_calls(tile: Tile) -> Iterator[FusedCall]:
    """A tile without a left edge: a full block, then a causal one; either may be missing."""
    if tile.hi == UNBOUNDED:
        yield FusedCall(tile, is_causal=False, masked=False)
        return
    diagonal = tile.q0 + tile.hi
    if diagonal > tile.k0:
        yield FusedCall(tile._replace(k1=diagonal, hi=UNBOUNDED), is_causal=False, masked=False)
    yield FusedCall(tile._replace(k0=diagonal), is_causal=True, masked=False)


def _masked_call(tile: Tile) -> FusedCall:
    return FusedCall(tile, is_causal=False, masked=tile.lo != -UNBOUNDED or tile.hi != UNBOUNDED)


def _mask(call: FusedCall, dtype: torch.dtype) -> Tensor | None:
    if not call.masked:
        return None
    tile = call.tile
    corner = tile.k0 - tile.q0
    return _band_mask(
        tile.q1 - tile.q0, tile.k1 - tile.k0, tile.lo - corner, tile.hi - corner, dtype
    )


@lru_cache(maxsize=16)
def _band_mask(nq: int, nk: int, lo: int, hi: int, dtype: torch.dtype) -> Tensor:
    """0 where `lo <= j - i <= hi`, else -inf: [nq, nk], the same for all inner blocks of a band."""
    distance = torch.arange(nk) - torch.arange(nq).unsqueeze(1)
    mask = torch.zeros(nq, nk, dtype=dtype)
    return mask.masked_fill_((distance < lo) | (distance > hi), -torch.inf)


def _to_kernel(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All with one head dim, padded with zeros, which change no score and no other column."""
    head_dim = max(x.shape[-1] for x in tensors)
    return tuple(
        F.pad(x, (0, head_dim - x.shape[-1]))
        if x.shape[-1] < head_dim
        else (x if x.stride(-1) == 1 else x.contiguous())
        for x in tensors
    )
