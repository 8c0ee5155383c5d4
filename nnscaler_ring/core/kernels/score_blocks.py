"""Attention in plain torch, a block of scores at a time: for what fused kernels do not have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nnscaler_ring.core.kernels.contract import BackwardTensors, TileGradients
from nnscaler_ring.core.kernels.cuts import score_blocks
from nnscaler_ring.core.kernels.tile_math import tile_backward, tile_forward
from nnscaler_ring.core.plan.tile import KernelCall, Tile
from nnscaler_ring.core.scores.scores import TileScores

SCORE_BLOCK = (512, 2048)
"""Rows and keys whose scores are built at a time: 4 MB per batch row and head in float32."""


@dataclass(frozen=True)
class ScoreBlocks:
    """Memory O(rows) and a few blocks of scores; any device and dtype, several times slower."""

    name: str

    def calls(self, tiles: Sequence[Tile], *, plain: bool) -> Sequence[KernelCall]:
        """The blocks that are not empty."""
        return [block for tile in tiles for block in score_blocks(tile, *SCORE_BLOCK)]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: TileScores) -> tuple[Tensor, Tensor]:
        """One block."""
        assert scores.segments is None, scores
        return tile_forward(q, k, v, scores)

    def backward(self, tensors: BackwardTensors, scores: TileScores) -> TileGradients:
        """One block."""
        assert scores.segments is None, scores
        return tile_backward(tensors, scores)


def blocks_backward(
    tensors: BackwardTensors, tiles: Iterable[Tile], scores: TileScores
) -> TileGradients:
    """The backward of several tiles; `scores.mods` must not depend on where a row or a key stands.

    The tiles take the place of the window and the segments in `scores`.
    """
    _, _, q, k, v, _, softmax_lse = tensors
    dq, dk, dv = (torch.zeros_like(x, dtype=softmax_lse.dtype) for x in (q, k, v))
    for tile in tiles:
        for block in score_blocks(tile, *SCORE_BLOCK):
            of_block = scores._replace(window=block.window(), segments=None)
            part = tile_backward(tensors.of_call(block, k, v), of_block)
            dq[:, block.q] += part.dq
            dk[:, block.k] += part.dk
            dv[:, block.k] += part.dv
    return TileGradients(dq, dk, dv)
