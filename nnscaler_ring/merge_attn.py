"""`merge_attention`: one result from results over different keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnscaler_ring.core.sums.merge_all import merge_all
from nnscaler_ring.core.sums.online_softmax import accumulation_dtype


def merge_attention(
    outs: Sequence[Tensor], softmax_lses: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The attention over all keys, from attention of the same queries over parts of them.

    Exact wherever every key is in one part: `softmax_lse` says how much of the softmax a part is.
    Differentiable in both.

    Args:
        outs: one or more [batch, tokens, num_heads, head_dim], or packed [tokens, num_heads,
            head_dim]: what the ops return.
        softmax_lses: as many [batch, num_heads, tokens], or packed [num_heads, tokens]: what they
            return with `return_lse=True`; -inf where a part shows a query no key.

    Returns:
        (out, softmax_lse), out in the dtype of the first of `outs`. A query that saw no key in any
        part has out 0 and softmax_lse -inf.

    Raises:
        ValueError: none, or shapes that do not belong together.
    """
    if not outs or len(outs) != len(softmax_lses):
        raise ValueError(
            "outs and softmax_lses must be equally many, at least one, got "
            f"{len(outs)} and {len(softmax_lses)}."
        )
    first = outs[0]
    packed = first.dim() == 3
    heads_first = (*first.shape[:-3], first.shape[-2], first.shape[-3])
    for out, lse in zip(outs, softmax_lses, strict=True):
        if first.dim() not in (3, 4) or out.shape != first.shape or lse.shape != heads_first:
            raise ValueError(
                "outs must all be [batch, tokens, num_heads, head_dim], or packed without batch, "
                "and softmax_lses [batch, num_heads, tokens], got "
                f"{[list(x.shape) for x in outs]} and {[list(x.shape) for x in softmax_lses]}."
            )
    dtype = accumulation_dtype(first.dtype)
    parts = torch.stack([x.to(dtype) for x in outs])
    lses = torch.stack([x.to(dtype) for x in softmax_lses])
    if packed:
        out, lse = merge_all(parts[:, None], lses[:, None])
        return out[0].to(first.dtype), lse[0]
    out, lse = merge_all(parts, lses)
    return out.to(first.dtype), lse
