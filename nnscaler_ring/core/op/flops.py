"""FLOPs of the ops, for torch.utils.flop_counter.FlopCounterMode.

They count what torch counts of its own attention: two products forward, five backward, of all
pairs of a query and a key, whether a mask hides the pair or not. Here it is one rank's part: its
rows against the keys of all ranks; of packed documents, every row against an equal share of its
document's keys, as far as the bounds can be read. Dilated attention counts the tokens that its
branches use. Sums over ranks are those of one device with the whole sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from nnscaler_ring.core.import_hook import after_import
from nnscaler_ring.core.op.options import Extras, split_arguments
from nnscaler_ring.core.ranks.groups import find_place

COUNTER = "torch.utils.flop_counter"
"""Importing it imports triton, so it is left to who counts."""

BETWEEN = 3
"""Arguments of a backward op between v and those of the forward op: out, softmax_lse, number."""


def register_when_imported() -> None:
    """Register the formulas now if torch's counter is imported, else right after it is."""
    after_import(COUNTER, "register_flop_formula", _register)


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    ops = torch.ops.nnscaler_ring
    for op, formula in (
        (ops.attention, attention_flops),
        (ops.attention_backward, attention_backward_flops),
        (ops.dilated_attention, dilated_flops),
        (ops.dilated_attention_backward, dilated_backward_flops),
    ):
        register_flop_formula(op, get_raw=True)(formula)


def attention_flops(q: Tensor, k: Tensor, v: Tensor, *others: Any, **_: Any) -> int:
    """q·k and the weighted sum of v."""
    return 2 * _pairs(q, k, others) * (q.shape[-1] + v.shape[-1])


def attention_backward_flops(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *others: Any,
    **_: Any,
) -> int:
    """The scores again, dq and dk; dv and the gradient of the weights."""
    return 2 * _pairs(q, k, others[BETWEEN:]) * (3 * q.shape[-1] + 2 * v.shape[-1])


def dilated_flops(q: Tensor, k: Tensor, v: Tensor, *others: Any, **_: Any) -> int:
    """As `attention_flops`, of the tokens that the branches use."""
    return 2 * _dilated_pairs(q, others) * (q.shape[-1] + v.shape[-1])


def dilated_backward_flops(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *others: Any,
    **_: Any,
) -> int:
    """As `attention_backward_flops`, of the tokens that the branches use."""
    return 2 * _dilated_pairs(q, others[BETWEEN:]) * (3 * q.shape[-1] + 2 * v.shape[-1])


def _pairs(q: Tensor, k: Tensor, others: Sequence[Any]) -> int:
    """Pairs of a query of this rank and a key of any, over batch and query heads."""
    extras, options = split_arguments(others)
    rows, heads = q.shape[-3], q.shape[-2]
    ranks = find_place(options.group).world_size
    documents = _lengths(extras)
    if documents is not None:
        return heads * (sum(a * b for a, b in documents) // ranks)
    lens = options.shard_lens_k or options.shard_lens
    keys = sum(lens) if lens is not None else k.shape[-3] * ranks
    batch = q.shape[0] if q.dim() == 4 else 1
    return batch * heads * rows * keys


def _lengths(extras: Extras) -> list[tuple[int, int]] | None:
    """Queries and keys of every document; None where there are none, or none that can be read."""
    bounds = (extras.cu_seqlens_q, extras.cu_seqlens_k)
    if any(cu is None or is_fake(cu) or cu.is_meta for cu in bounds):
        return None
    lens = (cu.diff().tolist() for cu in bounds if cu is not None)
    return list(zip(*lens, strict=True))


def _dilated_pairs(q: Tensor, others: Sequence[Any]) -> int:
    """A branch of rate r uses every r-th token of a segment, as query and as key."""
    _, group, shard_lens, segment_lengths, dilation_rates, *_ = others
    batch, rows, heads, _ = q.shape
    total = rows * find_place(group).world_size if shard_lens is None else sum(shard_lens)
    pairs = 0
    for length, rate in zip(segment_lengths, dilation_rates, strict=True):
        pairs += rows * min(length, total) // rate**2
    return batch * heads * pairs
