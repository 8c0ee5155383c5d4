"""Arguments of the public ops: ValueError with argument, rule, value and remedy, or TypeError."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from nnscaler_ring.core.exchange import EXCHANGES
from nnscaler_ring.core.kernels import KERNELS
from nnscaler_ring.core.schedule import Mask
from nnscaler_ring.core.tile import UNBOUNDED

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_qkv(q: Tensor, k: Tensor, v: Tensor, *, packed: bool) -> None:
    """Shapes, dtypes, devices and head counts of q, k, v: [batch, tokens, heads, head_dim]."""
    dims = "[tokens, num_heads, head_dim]" if packed else "[batch, tokens, num_heads, head_dim]"
    other = "a batch: wrap_ring_attn_func" if packed else "packed: wrap_ring_attn_varlen_func"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor {dims}, got {type(x).__name__}.")
        if x.dim() != (3 if packed else 4):
            raise ValueError(f"{name} must be {dims}, got shape {list(x.shape)}; for {other}.")
        if x.dtype not in DTYPES:
            raise ValueError(
                f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}; "
                f"convert it with {name}.to(torch.bfloat16), for example."
            )
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype, {q.dtype}, got {x.dtype}; convert it.")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device, {q.device}, got {x.device}; move it.")
        if x.shape[-1] < 1 or x.shape[-2] < 1:
            raise ValueError(f"{name} must have at least 1 head of 1 channel, got {list(x.shape)}.")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"v must have k's batch, tokens and heads, {list(k.shape[:-1])}, "
            f"got {list(v.shape[:-1])}."
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"k must have q's head_dim, {q.shape[-1]}, got {k.shape[-1]}; only v may differ."
        )
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"num_heads of q must be a multiple of num_kv_heads, got {q.shape[-2]} and "
            f"{k.shape[-2]}; repeat the KV heads, or change the head counts."
        )
    if not packed and q.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"k must have q's batch and tokens, {list(q.shape[:2])}, got {list(k.shape[:2])}; "
            "for queries and keys of different lengths use wrap_ring_attn_varlen_func."
        )


def check_mask(causal: bool, window_size: tuple[int, int]) -> Mask:
    """The mask of `causal` and `window_size`."""
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be True or False, got {causal!r}.")
    if not isinstance(window_size, Sequence) or not all(_is_int(side) for side in window_size):
        raise TypeError(f"window_size must be two ints (left, right), got {window_size!r}.")
    if len(window_size) != 2:
        raise ValueError(f"window_size must be two ints (left, right), got {window_size!r}.")
    if any(side < -1 for side in window_size):
        raise ValueError(
            f"window_size entries must be -1 or >= 0, got {window_size}; use -1 for unbounded."
        )
    left, right = (min(side, UNBOUNDED) for side in window_size)
    return Mask.from_window(causal, (left, right))


def check_scale(softmax_scale: float | None, head_dim: int) -> float:
    """`softmax_scale`, or 1 / sqrt(head_dim)."""
    if softmax_scale is None:
        return float(head_dim) ** -0.5
    if not isinstance(softmax_scale, Real) or isinstance(softmax_scale, bool):
        raise TypeError(f"softmax_scale must be a float or None, got {softmax_scale!r}.")
    if not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale must be finite, got {softmax_scale}; None: 1/sqrt(d).")
    return float(softmax_scale)


def check_choices(
    *, exchange: str, kernel: str, deterministic: bool, return_lse: bool, return_attn_probs: bool
) -> None:
    """The options that choose how, not what."""
    if not isinstance(exchange, str) or exchange not in EXCHANGES:
        raise ValueError(f"exchange must be one of {tuple(EXCHANGES)}, got {exchange!r}.")
    if kernel not in ("auto", *KERNELS):
        raise ValueError(f"kernel must be 'auto' or one of {KERNELS}, got {kernel!r}.")
    for name, flag in (("deterministic", deterministic), ("return_lse", return_lse)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}.")
    if return_attn_probs:
        raise NotImplementedError(
            "return_attn_probs must be False: the probabilities are the whole score matrix, which "
            "is never built; use return_lse=True for the softmax normaliser."
        )


def refuse_options(
    *,
    dropout_p: float,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    softcap: float,
    sinks: Tensor | None,
    dropout_seed: int | None,
) -> None:
    """Options that no kernel computes yet: refused when set, never ignored."""
    given = {
        "dropout_p": not isinstance(dropout_p, Real) or dropout_p != 0.0,
        "dropout_seed": dropout_seed is not None,
        "alibi_slopes": alibi_slopes is not None,
        "bias": bias is not None,
        "softcap": not isinstance(softcap, Real) or softcap != 0.0,
        "sinks": sinks is not None,
    }
    for name, is_set in given.items():
        if is_set:
            raise NotImplementedError(
                f"{name} is not implemented yet; leave it at its default, "
                f"{0.0 if name in ('dropout_p', 'softcap') else None}."
            )


def check_shard_lens(
    name: str, shard_lens: Sequence[int] | None, world_size: int
) -> list[int] | None:
    """`shard_lens` as a list if it fits the group; None, all shards equal, stays None."""
    if shard_lens is None:
        return None
    if isinstance(shard_lens, str) or not isinstance(shard_lens, Sequence):
        raise TypeError(
            f"{name} must be a sequence of ints, got {type(shard_lens).__name__}; use a list."
        )
    lens = list(shard_lens)
    if not all(_is_int(n) for n in lens):
        raise TypeError(f"{name} must hold ints, got {lens}.")
    if len(lens) != world_size:
        raise ValueError(
            f"{name} must have one length for each of the {world_size} ranks of process_group, "
            f"got {len(lens)}: {lens}."
        )
    if any(n < 0 for n in lens):
        raise ValueError(f"{name} must not be negative, got {lens}; 0 is an empty shard.")
    return lens


def check_own_length(name: str, lens: Sequence[int], block: int, tokens: int) -> None:
    """The list of all blocks' lengths says of this one what it is."""
    if lens[block] != tokens:
        raise ValueError(
            f"{name}[{block}] must be the number of tokens that this rank passes, {tokens}, "
            f"got {lens[block]} in {list(lens)}; it lists the tokens of every block, in block "
            "order; None means that all are equal."
        )


def check_zigzag_layout(layout: str) -> None:
    """The layouts in which `wrap_zigzag_attn_func` takes and gives tensors."""
    if layout not in ("contiguous", "zigzag"):
        raise ValueError(f"layout must be 'contiguous' or 'zigzag', got {layout!r}.")


def check_total(name: str, total: int) -> None:
    """A number of tokens."""
    if not _is_int(total):
        raise TypeError(f"{name} must be an int, got {total!r}.")
    if total < 0:
        raise ValueError(f"{name} must be >= 0, got {total}.")


def check_dim(x: Tensor, dim: int) -> int:
    """`dim` as a non-negative dimension of x."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}.")
    if not _is_int(dim):
        raise TypeError(f"dim must be an int, got {dim!r}.")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim must be a dimension of x, shape {list(x.shape)}, got {dim}.")
    return dim % x.dim()


def check_cu_seqlens_tensors(q: Tensor, cu_seqlens_q: object, cu_seqlens_k: object) -> None:
    """Type and shape of both; their values are checked by `check_cu_seqlens_values`."""
    documents = []
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(cu, Tensor):
            raise TypeError(
                f"{name} must be an int32 or int64 tensor [documents + 1], got {type(cu).__name__}."
            )
        if cu.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be int32 or int64, got {cu.dtype}; convert it.")
        if cu.dim() != 1 or cu.shape[0] < 2:
            raise ValueError(
                f"{name} must be [documents + 1] for at least one document, "
                f"got shape {list(cu.shape)}."
            )
        if cu.is_meta and not q.is_meta:
            raise ValueError(f"{name} must hold values, got a meta tensor; keep it on the CPU.")
        documents.append(cu.shape[0] - 1)
    if documents[0] != documents[1]:
        raise ValueError(
            f"cu_seqlens_k must have as many documents as cu_seqlens_q, {documents[0]}, "
            f"got {documents[1]}; a document without keys has length 0."
        )


def check_cu_seqlens_values(name: str, values: Sequence[int], total: int) -> None:
    """They start at 0, never fall and end at the total of tokens over all ranks."""
    if values[0] != 0:
        raise ValueError(
            f"{name} must start at 0, got {values[0]}; it is 0 and then the end of every document."
        )
    falls = [n for n in range(len(values) - 1) if values[n] > values[n + 1]]
    if falls:
        n = falls[0]
        raise ValueError(
            f"{name} must never fall, got {values[n]} before {values[n + 1]} at index {n}; "
            "a document without tokens repeats the value before it."
        )
    if values[-1] != total:
        raise ValueError(
            f"{name} must end at the tokens of all shards together, {total}, got {values[-1]}; "
            "it is global, the same on every rank; padding is a document of its own, and shards of "
            "different lengths need shard_lens."
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
