"""PyTorch's fused CPU attention, forward and backward, on strided views without copies.

Contract of the aten pair (torch 2.13): tensors are [b, h, rows, d]; `is_causal` is **top-left**
aligned and allows more queries than keys; v has q's head dim; zero rows kill the process; a last
dim that is not dense gives wrong numbers without an error; a float mask is allowed, a band is not.

Note [A band in fused calls]
    A causal tile that starts `hi` keys early is a full block and a causal one. Any other band is
    cut into blocks of query rows; within a block the keys that all its rows see are one full call,
    and only the corners at the edges need a mask, at most a few blocks wide.

Note [A gradient through the lse in a kernel that knows none]
    The gradient dlse of a row's softmax_lse adds `probability * dlse` to every score's gradient. A
    column of ones in v and of dlse in dout does that: `dout · v` grows by dlse for every key. The
    same column of out is 0, so the row sum `dout · out` stays, and dv's column is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from nnscaler_ring.core.kernels import Problem
from nnscaler_ring.core.kernels.tile_math import TileGradients, tile_backward, tile_forward
from nnscaler_ring.core.scores import ScoreMods
from nnscaler_ring.core.tile import UNBOUNDED, Tile, trim

aten = torch.ops.aten

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BLOCK_ROWS = 256
"""Query rows of a block of a band: the fused kernel runs at a fraction of its rate below that."""


FULL_BLOCK_ROWS = 768
"""Below, the fused backward rounds dk and dv to half precision every 64 query rows instead of every
256: in float32 such calls are exact enough for any number of ranks, and faster up to 256 rows."""


BLOCK_KEYS = 1024
"""Keys of a block of BLOCK_ROWS rows whose scores are built: what the fused kernel cannot do."""


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

    def calls(self, tiles: Sequence[Tile], *, plain: bool) -> Sequence[Tile]:
        """Full, causal and small masked blocks: Note [A band in fused calls]."""
        cut = fused_calls if plain else score_blocks
        return [call for tile in tiles for call in cut(tile)]

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        softmax_scale: float,
        window: tuple[int, int],
        mods: ScoreMods | None,
    ) -> tuple[Tensor, Tensor]:
        """One call of the fused kernel, or one block of scores."""
        if mods is not None:
            return tile_forward(q, k, v, softmax_scale=softmax_scale, window=window, mods=mods)
        v_head_dim = v.shape[-1]
        is_causal, mask = _masking(q, k, window)
        out, softmax_lse = aten._scaled_dot_product_flash_attention_for_cpu(
            *(x.transpose(1, 2) for x in _to_kernel(q, k, v)),
            0.0,
            is_causal,
            attn_mask=mask,
            scale=softmax_scale,
        )
        return out.transpose(1, 2)[..., :v_head_dim], softmax_lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dlse: Tensor | None,
        *,
        softmax_scale: float,
        window: tuple[int, int],
        mods: ScoreMods | None,
    ) -> TileGradients:
        """The backward of the same, in float32 where half precision is coarser."""
        if mods is not None:
            return tile_backward(
                dout,
                q,
                k,
                v,
                out,
                softmax_lse,
                dlse,
                softmax_scale=softmax_scale,
                window=window,
                mods=mods,
            )
        v_head_dim = v.shape[-1]
        if q.shape[1] < FULL_BLOCK_ROWS or dlse is not None:
            dout, q, k, v, out = (x.to(softmax_lse.dtype) for x in (dout, q, k, v, out))
        if dlse is not None:
            dout, v, out = _with_lse_column(dout, v, out, dlse)
        is_causal, mask = _masking(q, k, window)
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(x.transpose(1, 2) for x in _to_kernel(dout, q, k, v, out)),
            softmax_lse,
            0.0,
            is_causal,
            attn_mask=mask,
            scale=softmax_scale,
        )
        dims = (q.shape[-1], k.shape[-1], v_head_dim)
        dq, dk, dv = (
            gradient.transpose(1, 2)[..., :dim]
            for gradient, dim in zip(gradients, dims, strict=True)
        )
        return TileGradients(dq, dk, dv)


@lru_cache(maxsize=4096)
def fused_calls(tile: Tile) -> tuple[Tile, ...]:
    """The tile as tiles that the fused kernel computes, each pair in exactly one of them."""
    return tuple(_calls(tile))


def _calls(tile: Tile) -> Iterator[Tile]:
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
                yield box
            continue
        if corner := trim(block._replace(k1=seen_by_all[0])):
            yield corner
        if rest := trim(block._replace(k0=seen_by_all[0])):
            yield from _causal_calls(rest)


def _causal_calls(tile: Tile) -> Iterator[Tile]:
    """A tile without a left edge: a full block, then a causal one; either may be missing."""
    diagonal = tile.q0 + tile.hi
    if tile.hi == UNBOUNDED or diagonal == tile.k0:
        yield tile
        return
    yield tile._replace(k1=diagonal, hi=UNBOUNDED)
    if causal := trim(tile._replace(k0=diagonal)):
        yield causal


@lru_cache(maxsize=4096)
def score_blocks(tile: Tile) -> tuple[Tile, ...]:
    """The tile as blocks whose scores are small enough to be built, the empty ones left out."""
    blocks = (
        trim(
            tile._replace(
                q0=q0, q1=min(q0 + BLOCK_ROWS, tile.q1), k0=k0, k1=min(k0 + BLOCK_KEYS, tile.k1)
            )
        )
        for q0 in range(tile.q0, tile.q1, BLOCK_ROWS)
        for k0 in range(tile.k0, tile.k1, BLOCK_KEYS)
    )
    return tuple(block for block in blocks if block)


def _with_lse_column(
    dout: Tensor, v: Tensor, out: Tensor, dlse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # Note [A gradient through the lse in a kernel that knows none].
    return (
        torch.cat([dout, dlse.transpose(1, 2).unsqueeze(-1).to(dout.dtype)], dim=-1),
        F.pad(v, (0, 1), value=1.0),
        F.pad(out, (0, 1)),
    )


def _masking(q: Tensor, k: Tensor, window: tuple[int, int]) -> tuple[bool, Tensor | None]:
    """(is_causal, attn_mask) of one call."""
    if window == (-1, -1):
        return False, None
    nq, nk = q.shape[1], k.shape[1]
    left, right = window
    lo = -UNBOUNDED if left < 0 else nk - nq - left
    hi = UNBOUNDED if right < 0 else nk - nq + right
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
    """All with one head dim, padded with zeros, which change no score and no other column."""
    head_dim = max(x.shape[-1] for x in tensors)
    return tuple(
        F.pad(x, (0, head_dim - x.shape[-1]))
        if x.shape[-1] < head_dim
        else (x if x.stride(-1) == 1 else x.contiguous())
        for x in tensors
    )
