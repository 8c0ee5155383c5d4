"""Partial results over different keys, all at hand, merged at once; differentiable."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_all(outs: Tensor, softmax_lses: Tensor) -> tuple[Tensor, Tensor]:
    """The attention over all keys from the attention over disjoint parts of them.

    A row that saw no key in any part has out 0 and softmax_lse -inf.

    Args:
        outs: [parts, batch, tokens, num_heads, head_dim].
        softmax_lses: [parts, batch, num_heads, tokens], natural log; -inf where a part shows a row
            no key.

    Returns: (out [batch, tokens, num_heads, head_dim], softmax_lse [batch, num_heads, tokens]).
    """
    top = softmax_lses.amax(0).detach()
    blind = top == -torch.inf
    top = top.masked_fill(blind, 0.0)
    weights = (softmax_lses - top).exp()
    total = weights.sum(0)
    shares = weights / total.masked_fill(blind, 1.0)
    out = torch.einsum("nbht,nbthd->bthd", shares, outs.to(shares.dtype))
    # The log of 1 in blind rows, so that no gradient is NaN there.
    lse = total.masked_fill(blind, 1.0).log() + top
    return out, lse.masked_fill(blind, -torch.inf)
