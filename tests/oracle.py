"""Dense float64 attention: the definition that everything else is compared with.

Written in the plainest way, at O(tq * tk) cost, with nothing in common with the code under test.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnscaler_ring.masks import Mask, mask_of
from tests.masks import shown

Bounds = Tensor | Sequence[int]


def visible(
    tq: int,
    tk: int,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    mask: Mask | str | None = None,
    cu_seqlens_q: Bounds | None = None,
    cu_seqlens_k: Bounds | None = None,
) -> Tensor:
    """Which query sees which key: bool [tq, tk], bottom-right aligned in each document.

    In a document of lq queries and lk keys, query i sees key j iff
    i + lk - lq - left <= j <= i + lk - lq + right; an edge of -1 does not cut, and causal caps
    right at 0. Without cu_seqlens everything is one document. `mask`, a mask or its text, takes the
    place of causal and window_size.
    """
    left, right = window_size
    if causal:
        right = 0  # the cap: every window entry >= 0 and -1 become 0
    bounds_q = [0, tq] if cu_seqlens_q is None else [int(x) for x in cu_seqlens_q]
    bounds_k = [0, tk] if cu_seqlens_k is None else [int(x) for x in cu_seqlens_k]
    assert bounds_q[0] == 0 and bounds_q[-1] == tq, (bounds_q, tq)
    assert bounds_k[0] == 0 and bounds_k[-1] == tk, (bounds_k, tk)
    assert len(bounds_q) == len(bounds_k), (bounds_q, bounds_k)

    sees = torch.zeros(tq, tk, dtype=torch.bool)
    for document in range(len(bounds_q) - 1):
        q0, q1 = bounds_q[document : document + 2]
        k0, k1 = bounds_k[document : document + 2]
        position = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        key = torch.arange(k1 - k0)[None, :]
        block = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
        if mask is not None:
            its = mask_of(mask) if isinstance(mask, str) else mask
            block = shown(its, position, key, document)
        elif left >= 0:
            block &= key >= position - left
        if mask is None and right >= 0:
            block &= key <= position + right
        sees[q0:q1, k0:k1] = block
    return sees


def distances(
    tq: int, tk: int, cu_seqlens_q: Bounds | None = None, cu_seqlens_k: Bounds | None = None
) -> Tensor:
    """|i + lk - lq - j| within a document, 0 elsewhere: float64 [tq, tk]."""
    bounds_q = [0, tq] if cu_seqlens_q is None else [int(x) for x in cu_seqlens_q]
    bounds_k = [0, tk] if cu_seqlens_k is None else [int(x) for x in cu_seqlens_k]
    found = torch.zeros(tq, tk, dtype=torch.float64)
    for document in range(len(bounds_q) - 1):
        q0, q1 = bounds_q[document : document + 2]
        k0, k1 = bounds_k[document : document + 2]
        i, j = torch.arange(q1 - q0)[:, None], torch.arange(k1 - k0)[None, :]
        found[q0:q1, k0:k1] = (i + (k1 - k0) - (q1 - q0) - j).abs().to(torch.float64)
    return found


def dropout_factors(p: float, seed: int, batch: int, heads: int, tq: int, tk: int) -> Tensor:
    """0 for what attention dropout drops and 1 / (1 - p) for what it keeps: [batch, heads, tq, tk].

    The documented hash in Python's own integers: splitmix64 of seed, batch row, head and query one
    after another; of the key alone; and of the sum of both.
    """
    golden = 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x %= 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    threshold = int(p * 2**53)
    keys = [mix((j + 1) * golden) for j in range(tk)]
    kept = torch.zeros(batch, heads, tq, tk, dtype=torch.float64)
    for b in range(batch):
        of_row = mix(mix(seed + golden) + (b + 1) * golden)
        for h in range(heads):
            of_head = mix(of_row + (h + 1) * golden)
            for i in range(tq):
                of_query = mix(of_head + (i + 1) * golden)
                words = [mix(of_query + key) >> 11 for key in keys]
                kept[b, h, i] = torch.tensor([float(word >= threshold) for word in words])
    return kept / (1 - p)


@dataclass(frozen=True)
class Mods:
    """Options of attention, for the whole sequence; order: scale, softcap, bias and ALiBi, mask.

    `bias` [b or 1, h or 1, tq, tk], `alibi_slopes` [h] or [b, h], `sinks` [h]; `dropout_factors`
    [b, h, tq, tk] multiply the probabilities and leave the lse alone.
    """

    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    dropout_factors: Tensor | None = None


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    mask: Mask | str | None = None,
    cu_seqlens_q: Bounds | None = None,
    cu_seqlens_k: Bounds | None = None,
    mods: Mods = Mods(),
) -> tuple[Tensor, Tensor]:
    """Attention over the whole matrix in float64, differentiable in q, k, v, bias and sinks.

    Args:
        q: [b, tq, h, d], or packed [tq, h, d] with cu_seqlens_q.
        k: [b, tk, hk, d] or [tk, hk, d]; hk divides h.
        v: [b, tk, hk, dv] or [tk, hk, dv].
        cu_seqlens_k: the same as cu_seqlens_q if None.
        mods: packed tensors have a batch of one there.

    Returns: out [b, tq, h, dv] and softmax_lse [b, h, tq] (packed: [tq, h, dv] and [h, tq]). A row
    that sees no key has out 0, lse -inf (the sink's logit), and passes on zero gradients.
    """
    packed = q.dim() == 3
    assert packed == (cu_seqlens_q is not None), "packed tensors, and they alone, need cu_seqlens_q"
    if packed:
        q, k, v = q[None], k[None], v[None]
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    documents = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    tq, tk = q.shape[1], k.shape[1]
    sees = visible(tq, tk, causal=causal, window_size=window_size, mask=mask, **documents)
    far = distances(tq, tk, **documents)
    out, lse = _dense_batch(q, k, v, softmax_scale, sees, far, mods)
    return (out[0], lse[0]) if packed else (out, lse)


def _dense_batch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    sees: Tensor,
    far: Tensor,
    mods: Mods,
) -> tuple[Tensor, Tensor]:
    q, k, v = (x.to(torch.float64) for x in (q, k, v))
    heads_per_kv_head = q.shape[2] // k.shape[2]
    k = k.repeat_interleave(heads_per_kv_head, dim=2)
    v = v.repeat_interleave(heads_per_kv_head, dim=2)
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    sees, far = sees.to(q.device), far.to(q.device)

    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if mods.softcap:
        logits = mods.softcap * torch.tanh(logits / mods.softcap)
    if mods.bias is not None:
        logits = logits + mods.bias.to(torch.float64)
    if mods.alibi_slopes is not None:
        logits = logits - mods.alibi_slopes.to(torch.float64)[..., None, None] * far
    # A blind row is computed as if it saw everything and then replaced: torch.where passes zeros
    # back to it, where a softmax over nothing but -inf would pass back NaN.
    blind = ~sees.any(dim=1)
    logits = logits.masked_fill(~sees & ~blind[:, None], -math.inf)
    full_lse = torch.logsumexp(logits, dim=-1)
    nothing = torch.full_like(full_lse, -math.inf)
    if mods.sinks is not None:
        nothing = mods.sinks.to(torch.float64)[:, None].expand_as(full_lse)
        full_lse = torch.logaddexp(full_lse, nothing)
    weights = torch.exp(logits - full_lse[..., None])
    if mods.dropout_factors is not None:
        weights = weights * mods.dropout_factors
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    out = torch.where(blind[:, None, None], 0.0, out)
    lse = torch.where(blind, nothing, full_lse)
    return out, lse


def dense_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    *,
    dlse: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, dq, dk, dv) in float64 for a gradient `dout` of out and `dlse` of the lse."""
    q, k, v = (x.detach().to(torch.float64).requires_grad_() for x in (q, k, v))
    out, lse = dense_attention(q, k, v, **options)
    if dlse is None:
        dlse = torch.zeros_like(lse)
    dq, dk, dv = torch.autograd.grad(
        (out, lse), (q, k, v), (dout.to(torch.float64), dlse.to(torch.float64))
    )
    return out.detach(), lse.detach(), dq, dk, dv


def make_qkv(
    seed: int,
    b: int | None,
    tq: int,
    tk: int,
    h: int,
    hk: int,
    d: int,
    dv: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal q, k and v, the same for the same seed; packed (no batch) if b is None."""
    generator = torch.Generator().manual_seed(seed)
    batch = () if b is None else (b,)
    shapes = [(tq, h, d), (tk, hk, d), (tk, hk, d if dv is None else dv)]
    q, k, v = (
        torch.randn(*batch, *shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in shapes
    )
    return q, k, v


def make_dout(seed: int, q: Tensor, v: Tensor) -> Tensor:
    """A standard normal gradient of the output, in q's dtype: [b, tq, h, dv] or [tq, h, dv]."""
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    shape = (*q.shape[:-1], v.shape[-1])
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(q.dtype)


def random_cu_seqlens(rng: random.Random, total: int, documents: int) -> Tensor:
    """Bounds of `documents` documents of `total` tokens in all: int32 [documents + 1].

    From three documents on, one is empty and one has a single token, at random places.
    """
    lengths = [0, 1] if documents >= 3 and total >= 1 else []
    rest = total - sum(lengths)
    cuts = sorted(rng.randint(0, rest) for _ in range(documents - len(lengths) - 1))
    lengths += [end - start for start, end in zip([0, *cuts], [*cuts, rest], strict=True)]
    rng.shuffle(lengths)
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
