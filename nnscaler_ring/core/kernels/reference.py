"""The definition: attention of a tile in plain torch, any device and dtype, whole score matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnscaler_ring.core.kernels import Problem
from nnscaler_ring.core.online_softmax import accumulation_dtype
from nnscaler_ring.core.tile import Tile


class Reference:
    """Memory O(nq * nk) per tile; half precision is computed in float32."""

    name = "reference"

    def supports(self, problem: Problem) -> str | None:
        """Everything that torch can multiply, except what has no fixed order of summation."""
        if problem.deterministic and problem.device_type == "cuda":
            return "its CUDA matrix products promise no bitwise repeatability"
        return None

    def calls(self, tiles: Sequence[Tile]) -> Sequence[Tile]:
        """Any band is one call."""
        return tiles

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, window: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Softmax over the visible keys, and its log-sum-exp."""
        scores = _scores(q, k, softmax_scale, window)
        softmax_lse = torch.logsumexp(scores, dim=-1)
        probabilities = torch.exp(scores - softmax_lse.unsqueeze(-1))
        out = torch.einsum("bhqk,bkhd->bqhd", probabilities, _wide(v, q.shape[2]))
        return out.contiguous(), softmax_lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        *,
        softmax_scale: float,
        window: tuple[int, int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of this tile's share of the softmax that `softmax_lse` normalises."""
        num_heads, num_kv_heads = q.shape[2], k.shape[2]
        scores = _scores(q, k, softmax_scale, window)
        probabilities = torch.exp(scores - softmax_lse.unsqueeze(-1))
        q, dout, out = (_wide(x, num_heads) for x in (q, dout, out))
        k, v = _wide(k, num_heads), _wide(v, num_heads)
        dprobabilities = torch.einsum("bqhd,bkhd->bhqk", dout, v)
        delta = (dout * out).sum(-1).transpose(1, 2).unsqueeze(-1)
        dscores = probabilities * (dprobabilities - delta) * softmax_scale
        dq = torch.einsum("bhqk,bkhd->bqhd", dscores, k)
        dk = torch.einsum("bhqk,bqhd->bkhd", dscores, q)
        dv = torch.einsum("bhqk,bqhd->bkhd", probabilities, dout)
        return dq.contiguous(), _sum_groups(dk, num_kv_heads), _sum_groups(dv, num_kv_heads)


def _scores(q: Tensor, k: Tensor, softmax_scale: float, window: tuple[int, int]) -> Tensor:
    """[b, h, nq, nk], -inf where the window hides the key."""
    num_heads, nq, nk = q.shape[2], q.shape[1], k.shape[1]
    scores = torch.einsum("bqhd,bkhd->bhqk", _wide(q, num_heads), _wide(k, num_heads))
    query = torch.arange(nq, device=q.device).unsqueeze(1) + (nk - nq)
    distance = torch.arange(nk, device=q.device) - query
    left, right = window
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        hidden |= distance < -left
    if right >= 0:
        hidden |= distance > right
    return (scores * softmax_scale).masked_fill(hidden, -torch.inf)


def _wide(x: Tensor, num_heads: int) -> Tensor:
    """In the accumulation dtype, each KV head repeated for the query heads that share it."""
    x = x.to(accumulation_dtype(x.dtype))
    return x.repeat_interleave(num_heads // x.shape[2], dim=2)


def _sum_groups(x: Tensor, num_kv_heads: int) -> Tensor:
    """The inverse of the repetition: [b, n, h, d] summed to [b, n, h_kv, d]."""
    batch, rows, num_heads, head_dim = x.shape
    grouped = x.reshape(batch, rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    return grouped.sum(3)
