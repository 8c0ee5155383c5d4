"""Arguments of the public ops: ValueError with argument, rule, value and remedy, or TypeError."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from nnscaler_ring.core.exchange import EXCHANGES
from nnscaler_ring.core.kernels import KERNELS, WHOLE_OPS
from nnscaler_ring.core.op.taken_tensors import check_taken, warn_of_heads_first
from nnscaler_ring.core.plan.dilation import GROUPINGS, HeadOffsets
from nnscaler_ring.core.plan.masks import Mask, Window
from nnscaler_ring.core.plan.masks.window import sides_of, window_text
from nnscaler_ring.core.scores.dropout import DropoutSeed

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_qkv(q: Tensor, k: Tensor, v: Tensor, *, packed: bool) -> None:
    """Shapes, dtypes, devices and head counts of q, k, v: [batch, tokens, heads, head_dim]."""
    dims = "[tokens, num_heads, head_dim]" if packed else "[batch, tokens, num_heads, head_dim]"
    other = "a batch: wrap_ring_attn_func" if packed else "packed: wrap_ring_attn_varlen_func"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor {dims}, got {type(x).__name__}.")
        check_taken(name, x)
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
    warn_of_heads_first(q)


def check_mask(
    mask: Mask | str | None, causal: bool, window_size: tuple[int, int], *, causal_default: bool
) -> str:
    """The text of the mask: of `mask`, or of `causal` and `window_size`.

    `causal_default`: what the public function has where causal is left out.
    """
    left, right = _check_sides(causal, window_size)
    if mask is None:
        return window_text(left, right)
    if not isinstance(mask, (Mask, str)):
        raise TypeError(
            "mask must be a mask such as nnscaler_ring.masks.Chunks(8192), its text, or None, got "
            f"{type(mask).__name__}."
        )
    if causal is not causal_default or tuple(window_size) != (-1, -1):
        raise ValueError(
            "mask must be None where causal or window_size is given, got "
            f"mask={mask}, causal={causal}, window_size={tuple(window_size)}; the mask says "
            "all: leave both out, and combine masks with & or |."
        )
    return mask if isinstance(mask, str) else mask.text


def check_window(causal: bool, window_size: tuple[int, int]) -> Window:
    """The mask of `causal` and `window_size`."""
    return Window(*_check_sides(causal, window_size))


def _check_sides(causal: bool, window_size: tuple[int, int]) -> tuple[int, int]:
    """How far a query sees to the left and to the right, UNBOUNDED for all the way."""
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
    left, right = (_as_int(side) for side in window_size)
    return sides_of(causal, (left, right))


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
    names = (*KERNELS, *WHOLE_OPS)
    if kernel not in ("auto", *names):
        raise ValueError(f"kernel must be 'auto' or one of {names}, got {kernel!r}.")
    for name, flag in (("deterministic", deterministic), ("return_lse", return_lse)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}.")
    if return_attn_probs:
        raise NotImplementedError(
            "return_attn_probs must be False: the probabilities are the whole score matrix, which "
            "is never built; use return_lse=True for the softmax normaliser."
        )


def check_softcap(softcap: float) -> float:
    """The cap of the scores; 0 for none."""
    if not isinstance(softcap, Real) or isinstance(softcap, bool):
        raise TypeError(f"softcap must be a float, got {softcap!r}; 0.0 is none.")
    if not (math.isfinite(softcap) and softcap >= 0):
        raise ValueError(f"softcap must be finite and >= 0, got {softcap}; 0.0 is none.")
    return float(softcap)


def check_dropout_p(dropout_p: float) -> float:
    """The probability of dropping a probability."""
    if not isinstance(dropout_p, Real) or isinstance(dropout_p, bool):
        raise TypeError(f"dropout_p must be a float, got {dropout_p!r}; 0.0 is none.")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}; 0.0 is none.")
    return float(dropout_p)


def check_dropout_seed(dropout_seed: int | DropoutSeed | None, dropout_p: float) -> DropoutSeed:
    """The seed, and where this rank's batch rows and heads begin."""
    given = dropout_seed if isinstance(dropout_seed, DropoutSeed) else DropoutSeed(dropout_seed)
    if not (given.seed is None or _is_int(given.seed)):
        raise TypeError(f"dropout_seed must be an int or None, got {given.seed!r}.")
    if given.seed is not None and not -(2**63) <= given.seed < 2**63:
        raise ValueError(f"dropout_seed must fit into 64 bits, got {given.seed}.")
    if given.seed is not None and not dropout_p:
        raise ValueError(
            f"dropout_seed must be None where dropout_p is 0.0, got {given.seed}; set dropout_p, "
            "or leave dropout_seed out."
        )
    for name in ("first_batch", "first_head"):
        value = getattr(given, name)
        if not _is_int(value):
            raise TypeError(f"dropout_seed.{name} must be an int, got {value!r}.")
        if value < 0:
            raise ValueError(f"dropout_seed.{name} must be >= 0, got {value}.")
    seed = None if given.seed is None else _as_int(given.seed)
    return DropoutSeed(seed, _as_int(given.first_batch), _as_int(given.first_head))


def check_alibi_slopes(alibi_slopes: Tensor | None, q: Tensor) -> None:
    """[num_heads], or [batch, num_heads] beside a q with a batch."""
    if alibi_slopes is None:
        return
    _check_option("alibi_slopes", alibi_slopes, q)
    heads = q.shape[-2]
    shapes = [[heads]] if q.dim() == 3 else [[heads], [q.shape[0], heads]]
    if list(alibi_slopes.shape) not in shapes:
        raise ValueError(
            f"alibi_slopes must be {' or '.join(map(str, shapes))}, one slope per query head"
            f"{'' if q.dim() == 3 else ' (and row of the batch)'}, got {list(alibi_slopes.shape)}."
        )
    if alibi_slopes.requires_grad:
        raise ValueError(
            "alibi_slopes must not require a gradient, they are constants of the model; pass "
            "alibi_slopes.detach(), or a bias, which has a gradient."
        )


def check_bias(bias: Tensor | None, q: Tensor) -> None:
    """[batch or 1, num_heads or 1, rows of q, all keys]; packed: without batch."""
    if bias is None:
        return
    _check_option("bias", bias, q)
    packed = q.dim() == 3
    dims = f"[{'' if packed else 'batch or 1, '}num_heads or 1, this rank's query rows, all keys]"
    leading = [(1, q.shape[-2])] if packed else [(1, q.shape[0]), (1, q.shape[-2])]
    if bias.dim() != q.dim():
        raise ValueError(f"bias must be {dims}, got shape {list(bias.shape)}.")
    fits = all(n in sizes for n, sizes in zip(bias.shape, leading, strict=False))
    if not fits or bias.shape[-2] != q.shape[-3]:
        raise ValueError(
            f"bias must be {dims} for q {list(q.shape)}, got {list(bias.shape)}; its rows follow "
            "the layout in which this rank passes q, its keys are those of all ranks in order."
        )


def check_bias_keys(bias: Tensor, keys: int) -> None:
    """The last dimension of bias is every key of all ranks."""
    if bias.shape[-1] != keys:
        raise ValueError(
            f"bias must have a column for each of the {keys} keys of all ranks, got "
            f"{bias.shape[-1]} columns in {list(bias.shape)}; its rows are this rank's."
        )


def check_sinks(sinks: Tensor | None, q: Tensor) -> None:
    """[num_heads]."""
    if sinks is None:
        return
    _check_option("sinks", sinks, q)
    if list(sinks.shape) != [q.shape[-2]]:
        raise ValueError(
            f"sinks must be [num_heads], one logit per query head, [{q.shape[-2]}], got "
            f"{list(sinks.shape)}."
        )


def _check_option(name: str, x: object, q: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(x).__name__}.")
    check_taken(name, x)
    if not x.is_floating_point():
        raise ValueError(f"{name} must be of a floating dtype, got {x.dtype}; convert it.")
    if x.device != q.device:
        raise ValueError(f"{name} must be on q's device, {q.device}, got {x.device}; move it.")


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
    return [_as_int(n) for n in lens]


def check_own_length(name: str, lens: Sequence[int], block: int, tokens: int) -> None:
    """The list of all blocks' lengths says of this one what it is."""
    if lens[block] != tokens:
        raise ValueError(
            f"{name}[{block}] must be the number of tokens that this rank passes, {tokens}, "
            f"got {lens[block]} in {list(lens)}; it lists the tokens of every block, in block "
            "order; None means that all are equal."
        )


def check_packed_layout(layout: str) -> None:
    """The layouts of packed documents that a caller may hold."""
    if layout not in ("folded", "contiguous"):
        raise ValueError(f"layout must be 'folded' or 'contiguous', got {layout!r}.")


def check_layout(layout: str, layouts: Mapping[str, tuple[str, str]]) -> tuple[str, str]:
    """The layouts in which an op's rows are held and computed, of the names that it takes."""
    if not isinstance(layout, str) or layout not in layouts:
        names = " or ".join(map(repr, layouts))
        raise ValueError(f"layout must be {names}, got {layout!r}.")
    return layouts[layout]


def check_branches(
    segment_lengths: Sequence[int], dilation_rates: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Both as lists. Branches have as many lengths as rates, a rate within its segment."""
    for name, values in (("segment_lengths", segment_lengths), ("dilation_rates", dilation_rates)):
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise TypeError(f"{name} must be a sequence of ints, got {type(values).__name__}.")
        if not all(_is_int(n) for n in values):
            raise TypeError(f"{name} must hold ints, got {list(values)}.")
        if not values:
            raise ValueError(f"{name} must have one entry per branch, at least one, got none.")
        if any(n < 1 for n in values):
            raise ValueError(f"{name} must be >= 1, got {list(values)}; rate 1 is undilated.")
    if len(segment_lengths) != len(dilation_rates):
        raise ValueError(
            "dilation_rates must have one rate per segment length, "
            f"{len(segment_lengths)}, got {len(dilation_rates)}: {list(dilation_rates)} for "
            f"{list(segment_lengths)}."
        )
    for length, rate in zip(segment_lengths, dilation_rates, strict=True):
        if rate > length:
            raise ValueError(
                f"dilation_rates must not be above their segment length, got rate {rate} for "
                f"length {length}: most heads would use no token; take a longer segment."
            )
    return [_as_int(n) for n in segment_lengths], [_as_int(n) for n in dilation_rates]


def check_head_offsets(head_offsets: str | HeadOffsets, num_kv_heads: int) -> HeadOffsets:
    """The grouping, and where this rank's KV heads are among all of them."""
    given = head_offsets if isinstance(head_offsets, HeadOffsets) else HeadOffsets(head_offsets)
    if not isinstance(given.grouping, str) or given.grouping not in GROUPINGS:
        raise ValueError(f"head_offsets must be one of {GROUPINGS}, got {given.grouping!r}.")
    total = num_kv_heads if given.num_kv_heads is None else given.num_kv_heads
    for name, value in (("first_kv_head", given.first_kv_head), ("num_kv_heads", total)):
        if not _is_int(value):
            raise TypeError(f"head_offsets.{name} must be an int, got {value!r}.")
    if given.first_kv_head < 0 or given.first_kv_head + num_kv_heads > total:
        raise ValueError(
            f"head_offsets must place this rank's {num_kv_heads} KV heads among num_kv_heads="
            f"{total}, got first_kv_head={given.first_kv_head}; num_kv_heads counts the heads of "
            "all ranks that share the heads."
        )
    return given._replace(first_kv_head=_as_int(given.first_kv_head), num_kv_heads=_as_int(total))


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
    return _as_int(dim) % x.dim()


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
    """Also of numpy's integers, which are no Python ints."""
    return isinstance(value, (int, Integral)) and not isinstance(value, bool)


def _as_int(value: int | Integral) -> int:
    """A Python int; what passes for one while torch traces a program stays what it is."""
    return value if isinstance(value, int) else int(value)
