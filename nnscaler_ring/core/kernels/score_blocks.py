"""Attention in plain torch, a block of scores at a time: for what fused kernels do not have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nnscaler_ring.core.kernels.cuts import score_blocks
from nnscaler_ring.core.kernels.tile_math import TileGradients, tile_backward, tile_forward
from nnscaler_ring.core.plan.tile import KernelCall, Segments, Tile
from nnscaler_ring.core.scores.scores import ScoreMods

SCORE_BLOCK = (512, 2048)
"""Rows and keys whose scores are built at a time: 4 MB per batch row and head in float32."""


@dataclass(frozen=True)
class ScoreBlocks:
    """Memory O(rows) and a few blocks of scores; any device and dtype, several times slower."""

    name: str

    def calls(self, tiles: Sequence[Tile], *, plain: bool) -> Sequence[KernelCall]:
        """The blocks that are not empty."""
        return [block for tile in tiles for block in score_blocks(tile, *SCORE_BLOCK)]

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        softmax_scale: float,
        window: tuple[int, int],
        mods: ScoreMods | None,
        segments: Segments | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One block."""
        assert segments is None, segments
        return tile_forward(q, k, v, softmax_scale=softmax_scale, window=window, mods=mods)

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
        segments: Segments | None = None,
    ) -> TileGradients:
        """One block."""
        assert segments is None, segments
        tensors = dout, q, k, v, out, softmax_lse, dlse
        return tile_backward(*tensors, softmax_scale=softmax_scale, window=window, mods=mods)


def blocks_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dlse: Tensor | None,
    tiles: Iterable[Tile],
    *,
    softmax_scale: float,
    mods: ScoreMods | None,
) -> TileGradients:
    """The backward of several tiles; `mods` must not depend on where a row or a key stands."""
    dq, dk, dv = (torch.zeros_like(x, dtype=softmax_lse.dtype) for x in (q, k, v))
    for tile in tiles:
        for block in score_blocks(tile, *SCORE_BLOCK):
            part = tile_backward(
                dout[:, block.q],
                q[:, block.q],
                k[:, block.k],
                v[:, block.k],
                out[:, block.q],
                softmax_lse[..., block.q],
                None if dlse is None else dlse[..., block.q],
                softmax_scale=softmax_scale,
                window=block.window(),
                mods=mods,
            )
            dq[:, block.q] += part.dq
            dk[:, block.k] += part.dk
            dv[:, block.k] += part.dv
    return TileGradients(dq, dk, dv)
