"""Rotary position embedding: each pair of channels is turned by an angle that grows with position.

Scores then depend on the distance of two tokens alone, so a rank needs the positions of its own
tokens in the whole sequence and nothing else.

Source: Su et al., "RoFormer", arXiv 2104.09864.
"""

from __future__ import annotations

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]
"""cos and sin of the angles, [batch or 1, tokens, 1, head_dim / 2]."""


def rope_rotation(
    positions: Tensor, head_dim: int, dtype: torch.dtype, base: float = 10_000.0
) -> Rotation:
    """Compute what `rotate` turns the tokens at these positions by.

    Args:
        positions: int64 [batch or 1, tokens], in the whole sequence.
        head_dim: even; the n-th pair of channels turns `base ** (-2 n / head_dim)` per token.
        dtype: of the tensors that will be turned.
    """
    # In float64, so that a large position keeps its fraction of a turn. Speeds are Python numbers:
    # a tensor of them would have to follow the model from device to device, and through nnScaler.
    turned = positions.to(torch.float64).unsqueeze(-1).unsqueeze(-1)
    speeds = [base ** (-2 * pair / head_dim) for pair in range(head_dim // 2)]
    angles = torch.cat([turned * speed for speed in speeds], dim=3)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn channels n and n + head_dim / 2 of x [batch, tokens, heads, head_dim] as a pair.

    In x's dtype, which autocast may have made shorter than the rotation's.
    """
    cos, sin = rotation
    first, second = x.chunk(2, dim=3)
    turned = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=3)
    return turned.to(x.dtype)
