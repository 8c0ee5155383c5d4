"""Attention of a few queries over a cache of keys on one device, its lengths read from a tensor.

Knows nothing of ranks. The cache is read in pieces, so that no more than a piece is cast at a time
and the scores of a long cache are never held whole.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nnscaler_ring.core.sums.merge_all import merge_all
from nnscaler_ring.core.sums.online_softmax import accumulation_dtype, merge_

KEYS_AT_ONCE = 8192
"""Keys of a piece: its scores are num_heads * t floats for each."""


class CachedKeys(NamedTuple):
    """The rows of a cache that are in use, and where they stand in their requests.

    Args:
        k: [batch, capacity, num_kv_heads, head_dim].
        v: [batch, capacity, num_kv_heads, v_head_dim].
        lens: int64 [batch], how many rows are in use.
        positions: int64 [batch, capacity], in the request.
    """

    k: Tensor
    v: Tensor
    lens: Tensor
    positions: Tensor

    def piece(self, rows: slice) -> CachedKeys:
        """Some rows of it."""
        lens = (self.lens - rows.start).clamp(min=0)
        return CachedKeys(self.k[:, rows], self.v[:, rows], lens, self.positions[:, rows])


class Reach(NamedTuple):
    """How far queries see and how scores come about; the positions are those of the queries.

    Args:
        positions: int64 [batch, t], in the request; negative where it is shorter than t.
        softmax_scale: the factor of q·k.
        left: keys to the left that a query sees beside its own; -1 for all.
        softcap: 0.0 for none.
        alibi_slopes: [batch or 1, num_heads], or None.
    """

    positions: Tensor
    softmax_scale: float
    left: int
    softcap: float
    alibi_slopes: Tensor | None


def attend_to_cache(q: Tensor, cache: CachedKeys, reach: Reach) -> tuple[Tensor, Tensor]:
    """Attention of q [batch, t, num_heads, head_dim] over the rows of a cache that are in use.

    Returns: (out [batch, t, num_heads, v_head_dim], softmax_lse [batch, num_heads, t]) in float32,
    float64 for float64; 0 and -inf where a query sees no key.
    """
    dtype = accumulation_dtype(q.dtype)
    batch, t, heads, _ = q.shape
    out = q.new_zeros((batch, t, heads, cache.v.shape[-1]), dtype=dtype)
    lse = q.new_full((batch, heads, t), -torch.inf, dtype=dtype)
    for start in range(0, cache.k.shape[1], KEYS_AT_ONCE):
        piece = cache.piece(slice(start, start + KEYS_AT_ONCE))
        merge_(out, lse, *_attend(q.to(dtype), piece, reach))
    return out, lse


def with_sinks(out: Tensor, softmax_lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """The result with one more logit per head, whose value is 0; sinks [num_heads]."""
    logits = sinks.to(softmax_lse.dtype).view(1, -1, 1).expand_as(softmax_lse)
    return merge_all(torch.stack([out, torch.zeros_like(out)]), torch.stack([softmax_lse, logits]))


def _attend(q: Tensor, cache: CachedKeys, reach: Reach) -> tuple[Tensor, Tensor]:
    heads = q.shape[2]
    keys, kv_heads = cache.k.shape[1:3]
    k, v = cache.k.to(q.dtype), cache.v.to(q.dtype)
    grouped = q.unflatten(2, (kv_heads, heads // kv_heads))
    scores = torch.einsum("btgrd,bkgd->bgrtk", grouped, k).flatten(1, 2) * reach.softmax_scale
    if reach.softcap:
        scores = reach.softcap * torch.tanh(scores / reach.softcap)
    distance = reach.positions[:, :, None] - cache.positions[:, None, :]
    if reach.alibi_slopes is not None:
        slopes = reach.alibi_slopes.to(scores.dtype)[..., None, None]
        scores = scores - slopes * distance.abs()[:, None]
    in_use = torch.arange(keys, device=q.device) < cache.lens[:, None]
    sees = in_use[:, None, :] & (distance >= 0)
    if reach.left >= 0:
        sees = sees & (distance <= reach.left)
    scores = scores.masked_fill(~sees[:, None], -torch.inf)
    lse = torch.logsumexp(scores, -1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    weights = weights.unflatten(1, (kv_heads, heads // kv_heads))
    # A row that is not in use may hold anything, also what is not a number.
    v = v.masked_fill(~in_use[:, :, None, None], 0.0)
    return torch.einsum("bgrtk,bkgd->btgrd", weights, v).flatten(2, 3), lse
