"""Dilated attention by its definition, dense and in float64: what the op is compared with."""

from collections.abc import Sequence

import torch
from torch import Tensor


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    causal: bool,
    head_offsets: str = "mod",
    softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse [b, h, t]) of [b, t, h, d]: one softmax over every branch's keys, side by side."""
    tokens, num_heads, num_kv_heads = q.shape[1], q.shape[2], k.shape[2]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    k, v = (x.repeat_interleave(num_heads // num_kv_heads, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    masks = [
        visible(tokens, num_heads, num_kv_heads, w, r, causal, head_offsets)
        for w, r in zip(segment_lengths, dilation_rates, strict=True)
    ]
    side_by_side = torch.cat([scores.masked_fill(~mask, -torch.inf) for mask in masks], dim=-1)
    lse = torch.logsumexp(side_by_side, dim=-1)
    probabilities = torch.exp(side_by_side - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    values = torch.cat([v] * len(masks), dim=1)
    return torch.einsum("bhij,bjhd->bihd", probabilities, values), lse


def visible(
    tokens: int, num_heads: int, num_kv_heads: int, w: int, r: int, causal: bool, head_offsets: str
) -> Tensor:
    """[num_heads, tokens, tokens]: which keys one branch shows."""
    kv_head = torch.arange(num_heads) // (num_heads // num_kv_heads)
    offset = kv_head % r if head_offsets == "mod" else kv_head // -(-num_kv_heads // r)
    position = torch.arange(tokens)
    used = position % w % r == offset[:, None]
    pairs = used[:, :, None] & used[:, None, :] & (position[:, None] // w == position // w)
    return pairs & (position[:, None] >= position) if causal else pairs


def dilated_gradients(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor | None, *branches: Sequence[int],
    **options: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    """out, lse, dq, dk, dv; rows that see no key have no gradient through their lse."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, lse = dilated_attention(q, k, v, *branches, **options)  # type: ignore[arg-type]
    loss = (out * dout).sum()
    if dlse is not None:
        seen = lse > -torch.inf
        loss = loss + (lse[seen] * dlse[seen]).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k, v))
