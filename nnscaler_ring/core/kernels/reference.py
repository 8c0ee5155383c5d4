"""The definition: attention of a tile in plain torch, any device and dtype, whole score matrix."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nnscaler_ring.core.kernels.contract import (
    AttentionKernel,
    BackwardTensors,
    Problem,
    TileGradients,
)
from nnscaler_ring.core.kernels.tile_math import tile_backward, tile_forward
from nnscaler_ring.core.plan.tile import KernelCall, Tile
from nnscaler_ring.core.scores.scores import TileScores


class Reference:
    """Memory O(nq * nk) per tile; half precision is computed in float32."""

    name = "reference"

    def supports(self, problem: Problem) -> str | None:
        """Everything that torch can multiply, except what has no fixed order of summation."""
        if problem.deterministic and problem.device_type == "cuda":
            return "its CUDA matrix products promise no bitwise repeatability"
        return None

    def prepared(self, problem: Problem) -> AttentionKernel:
        """The same for every call."""
        return self

    def calls(self, tiles: Sequence[Tile], *, plain: bool) -> Sequence[KernelCall]:
        """Any band is one call."""
        return tiles

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: TileScores) -> tuple[Tensor, Tensor]:
        """Softmax over the visible keys, and its log-sum-exp."""
        return tile_forward(q, k, v, scores)

    def backward(self, tensors: BackwardTensors, scores: TileScores) -> TileGradients:
        """Gradients of this tile's share of the softmax that `softmax_lse` normalises."""
        return tile_backward(tensors, scores)
