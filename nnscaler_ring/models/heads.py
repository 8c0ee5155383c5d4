"""Projections from the residual stream to attention heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def to_heads(x: Tensor, linear: nn.Linear, num_heads: int) -> Tensor:
    """Compute `linear(x)`, split into heads: [batch, tokens, width] to [batch, tokens, heads, d].

    The weight is split instead of the result, whose shape is never read: nnScaler gathers whatever
    has its shape read.
    """
    weight = linear.weight.view(num_heads, -1, linear.in_features)
    heads = torch.einsum("b t c, h d c -> b t h d", x, weight)
    if linear.bias is None:
        return heads
    return heads + linear.bias.view(num_heads, -1).to(heads.dtype)  # shorter under autocast
