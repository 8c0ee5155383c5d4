"""Scales of 0 and below for kernels that take a scale above 0.

Fused kernels look for the largest score before they scale it, or scale their mask of -inf as well:
with a scale that is not above 0 they give NaN or overflow. The sign can go into q instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nnscaler_ring.core.kernels.contract import AttentionKernel, BackwardTensors, TileGradients
from nnscaler_ring.core.plan.tile import KernelCall, Tile
from nnscaler_ring.core.scores.scores import TileScores


def for_scale(kernel: AttentionKernel, softmax_scale: float) -> AttentionKernel:
    """A kernel that computes with this scale: the same one where it is above 0."""
    return kernel if softmax_scale > 0 else _SignInQueries(kernel)


@dataclass(frozen=True)
class _SignInQueries:
    """Multiplies q, and its gradient, by -1 or 0, and gives the kernel a scale above 0."""

    kernel: AttentionKernel

    @property
    def name(self) -> str:
        """That of the kernel within."""
        return self.kernel.name

    def calls(self, tiles: Sequence[Tile], *, plain: bool) -> Sequence[KernelCall]:
        """Those of the kernel within."""
        return self.kernel.calls(tiles, plain=plain)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: TileScores) -> tuple[Tensor, Tensor]:
        """(factor * q)·k times a scale above 0 is q·k times the scale that was asked for."""
        factor, scores = _folded(scores)
        return self.kernel.forward(q * factor, k, v, scores)

    def backward(self, tensors: BackwardTensors, scores: TileScores) -> TileGradients:
        """The chain rule gives dq the factor; dk has it from q already."""
        factor, scores = _folded(scores)
        gradients = self.kernel.backward(tensors._replace(q=tensors.q * factor), scores)
        return gradients._replace(dq=gradients.dq * factor)


def _folded(scores: TileScores) -> tuple[float, TileScores]:
    """What q is to be multiplied by, and the scores with a scale above 0."""
    if scores.softmax_scale == 0:
        return 0.0, scores._replace(softmax_scale=1.0)
    return -1.0, scores._replace(softmax_scale=-scores.softmax_scale)
