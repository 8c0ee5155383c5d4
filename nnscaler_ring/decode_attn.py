"""`decode_attention`: the next tokens of requests whose caches of keys lie on several ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nnscaler_ring.core.decode import CachedKeys, Reach, attend_to_cache, with_sinks
from nnscaler_ring.core.op import checks
from nnscaler_ring.core.op.call import describe, tag_of
from nnscaler_ring.core.op.prepare import transport_of
from nnscaler_ring.core.ranks.agreement import agree, refusing_together
from nnscaler_ring.core.ranks.groups import ALONE, find_place, group_string
from nnscaler_ring.core.ranks.transport import Transport, connect
from nnscaler_ring.core.sums.merge_all import merge_all

if TYPE_CHECKING:
    from nnscaler_ring.core.ranks.groups import ProcessGroupLike

OP = "decode_attention"
KERNELS = ("auto", "reference")


@dataclass(frozen=True)
class DecodeCall:
    """What the ranks must agree on; lengths and capacities are not among it."""

    op: str
    block_order: tuple[int, ...]
    q: tuple[int, ...]
    num_kv_heads: int
    v_head_dim: int
    dtype: torch.dtype
    device_type: str
    softmax_scale: float
    window_size: tuple[int, int]
    softcap: float
    alibi_slopes: tuple[int, ...] | None
    sinks: bool
    key_positions: bool


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lens: Tensor,
    process_group: ProcessGroupLike | None = None,
    *,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_positions: Tensor | None = None,
    return_lse: bool = False,
    kernel: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact causal attention of the last tokens of requests over caches spread over the ranks.

    Every rank attends to its own rows of the cache, and the partial results of a few tokens
    travel, not the keys: per call, num_heads * (v_head_dim + 1) floats for each token and rank,
    and where positions count (t > 1, a window, ALiBi) the lengths before. Lengths are data: a new
    one is no new plan, and the ranks do not compare anything again.

    Args:
        q: [batch, t, num_heads, head_dim], the same on every rank: the last t tokens of each
            request.
        k_cache: [batch, capacity, num_kv_heads, head_dim], this rank's rows; v_cache: [batch,
            capacity, num_kv_heads, v_head_dim]. Somewhere on the ranks they hold the keys of the t
            tokens too. The capacity may differ between ranks and calls, and be 0.
        cache_lens: int32 or int64 [batch], how many of the first rows are in use here: from 0 to
            the capacity. The length of a request is the sum over the ranks.
        process_group: as in `wrap_ring_attn_func`.
        softmax_scale, softcap, alibi_slopes, sinks: as in `wrap_ring_attn_func`.
        window_size: (left, right) in tokens; attention is causal whatever right is.
        key_positions: int32 or int64 [batch, capacity], where the rows stand in their requests,
            from 0. None: rows lie in block order, those of rank 0 first.
        return_lse: also return the softmax normaliser.
        kernel: "auto" or "reference": operators of torch on any device.

    Returns:
        out [batch, t, num_heads, v_head_dim] in q's dtype, the same on every rank; with
        `return_lse` also softmax_lse [batch, num_heads, t], float32 (float64 for float64). A token
        of a request that is shorter than t has out 0 and softmax_lse -inf (the sink's logit).

    Raises:
        ValueError, TypeError: a wrong argument, on this or on another rank of the group. There is
            no gradient: with tensors that ask for one, use `wrap_ring_attn_varlen_func`.
    """
    group = group_string(process_group)
    place = find_place(group)
    with refusing_together(group, OP):
        _check_tensors(q, k_cache, v_cache, cache_lens, key_positions)
        _check_kernel(kernel, return_lse)
        window = checks.check_window(True, window_size)
        left = -1 if window_size[0] < 0 else window.left
        scale = checks.check_scale(softmax_scale, q.shape[-1])
        softcap = checks.check_softcap(softcap)
        checks.check_alibi_slopes(alibi_slopes, q)
        checks.check_sinks(sinks, q)
        call = DecodeCall(
            op=OP,
            block_order=place.members,
            q=tuple(q.shape),
            num_kv_heads=k_cache.shape[2],
            v_head_dim=v_cache.shape[3],
            dtype=q.dtype,
            device_type=q.device.type,
            softmax_scale=scale,
            window_size=(left, 0),
            softcap=softcap,
            alibi_slopes=None if alibi_slopes is None else tuple(alibi_slopes.shape),
            sinks=sinks is not None,
            key_positions=key_positions is not None,
        )
    entered = agree(group, call, OP, lambda: describe(call), tag=tag_of(call))
    connect(group, q.device)
    slopes = None if alibi_slopes is None else alibi_slopes.expand(q.shape[0], -1)
    lens = cache_lens.to(q.device, torch.int64)
    with entered:
        transport = transport_of(place, entered)
        if q.shape[1] > 1 or left >= 0 or slopes is not None:
            everybodys = lens[None] if group == ALONE else transport.all_gather("partial", lens)
            positions = _key_positions(k_cache, key_positions, everybodys[: place.block].sum(0))
            last = torch.arange(q.shape[1], device=q.device) - q.shape[1]
            of_queries = everybodys.sum(0)[:, None] + last
        else:
            # A single token sees every key, so that nobody need know where they stand.
            positions = lens.new_zeros(k_cache.shape[:2])
            of_queries = lens.new_zeros((len(lens), 1))
        reach = Reach(of_queries, scale, left, softcap, slopes)
        out, lse = attend_to_cache(q, CachedKeys(k_cache, v_cache, lens, positions), reach)
        if group != ALONE:
            out, lse = _merged(out, lse, transport)
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    out = out.to(q.dtype)
    return (out, lse) if return_lse else out


def _merged(out: Tensor, lse: Tensor, transport: Transport) -> tuple[Tensor, Tensor]:
    """Over all ranks; out and lse travel as one message."""
    together = torch.cat([out, lse.transpose(1, 2)[..., None]], dim=-1)
    parts = transport.all_gather("partial", together)
    return merge_all(parts[..., :-1], parts[..., -1].transpose(2, 3))


def _key_positions(k_cache: Tensor, given: Tensor | None, before: Tensor) -> Tensor:
    """Where every row stands in its request: int64 [batch, capacity]."""
    if given is not None:
        return given.to(k_cache.device, torch.int64)
    return before[:, None] + torch.arange(k_cache.shape[1], device=k_cache.device)


def _check_tensors(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lens: Tensor, key_positions: Tensor | None
) -> None:
    if q.dim() != 4:
        raise ValueError(f"q must be [batch, t, num_heads, head_dim], got {list(q.shape)}.")
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.dim() != 4 or x.shape[0] != q.shape[0] or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} must be [batch, capacity, num_kv_heads, head_dim] with q's batch, dtype "
                f"and device, {q.shape[0]}, {q.dtype}, {q.device}, got {list(x.shape)}, {x.dtype}, "
                f"{x.device}."
            )
    if k_cache.shape[:3] != v_cache.shape[:3] or k_cache.shape[3] != q.shape[3]:
        raise ValueError(
            "k_cache and v_cache must have the same rows and heads, and k_cache q's head_dim, got "
            f"{list(k_cache.shape)}, {list(v_cache.shape)} and q {list(q.shape)}."
        )
    if k_cache.shape[2] == 0 or q.shape[2] % k_cache.shape[2]:
        raise ValueError(
            f"num_heads of q must be a multiple of num_kv_heads, got {q.shape[2]} and "
            f"{k_cache.shape[2]}."
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_cache, v_cache)):
        raise ValueError(
            "q, k_cache and v_cache must not require gradients, which decode_attention does not "
            "compute; call it under torch.no_grad(), or use wrap_ring_attn_varlen_func."
        )
    integers = [("cache_lens", cache_lens, tuple(q.shape[:1]))]
    if key_positions is not None:
        integers.append(("key_positions", key_positions, tuple(k_cache.shape[:2])))
    for name, x, shape in integers:
        if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be an int32 or int64 tensor, got {x!r}.")
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(x.shape)}.")
    # On a device, looking would wait for it.
    if cache_lens.device.type == "cpu" and cache_lens.numel():
        low, high = int(cache_lens.min()), int(cache_lens.max())
        if low < 0 or high > k_cache.shape[1]:
            raise ValueError(
                f"cache_lens must be from 0 to the capacity, {k_cache.shape[1]}, got "
                f"{cache_lens.tolist()}."
            )


def _check_kernel(kernel: str, return_lse: bool) -> None:
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {KERNELS}, got {kernel!r}.")
    if not isinstance(return_lse, bool):
        raise TypeError(f"return_lse must be True or False, got {return_lse!r}.")
