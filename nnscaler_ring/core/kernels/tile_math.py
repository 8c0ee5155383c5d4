"""Attention of one tile in plain torch, forward and backward: the formulas that kernels share.

Any device and dtype; the scores of the whole tile are built. Half precision is computed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnscaler_ring.core.kernels.contract import BackwardTensors, TileGradients
from nnscaler_ring.core.scores.scores import ScoreMods, TileScores
from nnscaler_ring.core.sums.online_softmax import accumulation_dtype


def tile_forward(q: Tensor, k: Tensor, v: Tensor, scores: TileScores) -> tuple[Tensor, Tensor]:
    """Softmax over the visible keys, and its log-sum-exp; a row that sees none gives 0 and -inf."""
    logits, _ = _logits(q, k, scores)
    softmax_lse = torch.logsumexp(logits, dim=-1)
    probabilities = _probabilities(logits, softmax_lse)
    factors = _dropout_factors(probabilities, scores.mods)
    if factors is not None:
        probabilities = probabilities * factors
    out = torch.einsum("bhqk,bkhd->bqhd", probabilities, _wide(v, q.shape[2]))
    return out.contiguous(), softmax_lse


def tile_backward(tensors: BackwardTensors, scores: TileScores) -> TileGradients:
    """Gradients of this tile's share of the softmax that `softmax_lse` normalises."""
    dout, dlse, q, k, v, out, softmax_lse = tensors
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    logits, slope = _logits(q, k, scores)
    mods, softmax_scale = scores.mods, scores.softmax_scale
    probabilities = _probabilities(logits, softmax_lse)
    q, dout, out = (_wide(x, num_heads) for x in (q, dout, out))
    k, v = _wide(k, num_heads), _wide(v, num_heads)
    dprobabilities = torch.einsum("bqhd,bkhd->bhqk", dout, v)
    kept = probabilities
    factors = _dropout_factors(probabilities, mods)
    if factors is not None:
        dprobabilities, kept = dprobabilities * factors, probabilities * factors
    dv = torch.einsum("bhqk,bqhd->bkhd", kept, dout)
    delta = torch.linalg.vecdot(dout, out).transpose(1, 2)
    if dlse is not None:
        delta = delta - dlse
    dscores = probabilities * (dprobabilities - delta.unsqueeze(-1))
    dbias = dscores if mods is not None and mods.needs_dbias else None
    dscores = dscores * (softmax_scale if slope is None else slope * softmax_scale)
    dq = torch.einsum("bhqk,bkhd->bqhd", dscores, k)
    dk = torch.einsum("bhqk,bqhd->bkhd", dscores, q)
    return TileGradients(
        dq.contiguous(), sum_kv_heads(dk, num_kv_heads), sum_kv_heads(dv, num_kv_heads), dbias
    )


def _logits(q: Tensor, k: Tensor, scores: TileScores) -> tuple[Tensor, Tensor | None]:
    """[b, h, nq, nk], -inf where the window hides the key; and the slope of the softcap there."""
    num_heads, mods = q.shape[2], scores.mods
    logits = torch.einsum("bqhd,bkhd->bhqk", _wide(q, num_heads), _wide(k, num_heads))
    logits = logits * scores.softmax_scale
    slope = None
    if mods is not None:
        if mods.softcap:
            ratio = torch.tanh(logits / mods.softcap)
            logits, slope = mods.softcap * ratio, 1 - ratio * ratio
        added = mods.additions(logits.dtype)
        if added is not None:
            logits = logits + added
    hidden = _hidden(q.shape[1], k.shape[1], scores.window, q.device)
    return (logits if hidden is None else logits.masked_fill(hidden, -torch.inf)), slope


def _hidden(nq: int, nk: int, window: tuple[int, int], device: torch.device) -> Tensor | None:
    left, right = window
    if window == (-1, -1):
        return None
    query = torch.arange(nq, device=device).unsqueeze(1) + (nk - nq)
    distance = torch.arange(nk, device=device) - query
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        hidden |= distance < -left
    if right >= 0:
        hidden |= distance > right
    return hidden


def _probabilities(logits: Tensor, softmax_lse: Tensor) -> Tensor:
    # A bias may hide every key of a row: exp(-inf - inf) is the 0 that exp(-inf + inf) is not.
    finite = softmax_lse.masked_fill(softmax_lse == -torch.inf, torch.inf)
    return torch.exp(logits - finite.unsqueeze(-1))


def _dropout_factors(probabilities: Tensor, mods: ScoreMods | None) -> Tensor | None:
    if mods is None:
        return None
    batch, num_heads, _, _ = probabilities.shape
    return mods.dropout_factors(batch, num_heads, probabilities.dtype)


def _wide(x: Tensor, num_heads: int) -> Tensor:
    """In the accumulation dtype, each KV head repeated for the query heads that share it."""
    return repeat_kv_heads(x.to(accumulation_dtype(x.dtype)), num_heads)


def repeat_kv_heads(x: Tensor, num_heads: int) -> Tensor:
    """[b, n, h_kv, d] as [b, n, num_heads, d], for kernels without grouped heads."""
    if x.shape[2] == num_heads:
        return x
    return x.repeat_interleave(num_heads // x.shape[2], dim=2)


def sum_kv_heads(x: Tensor, num_kv_heads: int) -> Tensor:
    """The inverse of the repetition: [b, n, h, d] summed to [b, n, h_kv, d]."""
    batch, rows, num_heads, head_dim = x.shape
    grouped = x.reshape(batch, rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    return grouped.sum(3)
