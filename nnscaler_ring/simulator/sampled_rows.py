"""Float64 attention of a few queries over any number of keys: what results are checked against."""

from __future__ import annotations

import torch
from torch import Tensor

from nnscaler_ring.core.sums.online_softmax import merge_
from nnscaler_ring.simulator.inputs import Inputs

KEYS_AT_ONCE = 1 << 16


def exact_rows(
    inputs: Inputs,
    queries: Tensor,
    softmax_scale: float,
    first: int,
    last: int,
    *,
    left: int | None = None,
    right: int | None = None,
    stride: int = 1,
) -> tuple[Tensor, Tensor]:
    """Attention of some queries to the keys `first, first + stride, ... < last`, in float64.

    Memory does not depend on the number of keys. Plain torch, with nothing of kernels or tiles.

    Args:
        queries: int64 [n], the tokens whose rows are wanted.
        left, right: how far a query sees, in tokens; None: without limit.

    Returns:
        out [batch, n, heads, v_head_dim] and softmax_lse [batch, heads, n].
    """
    q = inputs.rows("q", queries).double()
    heads = q.shape[2]
    out = lse = None
    for start in range(first, last, KEYS_AT_ONCE * stride):
        keys = torch.arange(start, min(start + KEYS_AT_ONCE * stride, last), stride)
        k, v = (inputs.rows(name, keys).double() for name in ("k", "v"))
        k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
        distance = (keys - queries.unsqueeze(1)).to(scores.device)
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if left is not None:
            hidden |= distance < -left
        if right is not None:
            hidden |= distance > right
        scores = scores.masked_fill(hidden, -torch.inf)
        block_lse = scores.logsumexp(-1)
        weights = torch.exp(scores - block_lse.nan_to_num(neginf=0.0).unsqueeze(-1))
        block = torch.einsum("bhqk,bkhd->bqhd", weights, v)
        if out is None or lse is None:
            out, lse = block, block_lse
        else:
            merge_(out, lse, block, block_lse)
    assert out is not None and lse is not None, (first, last)
    return out, lse
