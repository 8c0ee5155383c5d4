"""`wrap_zigzag_attn_func`: exact attention with causal work balanced over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nnscaler_ring.core.op.attention import context_parallel_attention
from nnscaler_ring.core.op.checks import (
    check_dim,
    check_own_length,
    check_shard_lens,
    check_total,
)
from nnscaler_ring.core.op.relayout_op import relayout_op
from nnscaler_ring.core.plan.layout import LAYOUTS, Zigzag
from nnscaler_ring.core.plan.shared_units import SharedUnits
from nnscaler_ring.core.ranks.agreement import refusing_together
from nnscaler_ring.core.ranks.groups import find_place, group_string, mesh_place, mesh_strings
from nnscaler_ring.core.token_index import token_index

if TYPE_CHECKING:
    from nnscaler_ring.core.plan.masks import Mask
    from nnscaler_ring.core.ranks.groups import ProcessGroupLike
    from nnscaler_ring.core.scores.dropout import DropoutSeed

LAYOUTS_OF_ZIGZAG = {"contiguous": ("contiguous", "zigzag"), "zigzag": ("zigzag", "zigzag")}
"""`layout`: the layouts, of `LAYOUTS`, in which the caller holds the rows and they are computed."""


def wrap_zigzag_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    process_group: ProcessGroupLike | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout_seed: int | DropoutSeed | None = None,
    return_lse: bool = False,
    shard_lens: Sequence[int] | None = None,
    exchange: str = "direct",
    kernel: str = "auto",
    layout: str = "contiguous",
    mask: Mask | str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention where rank r computes chunks r and 2N-1-r of 2N: balanced when causal.

    Chunk c of 2N is tokens `[c*T//2N, (c+1)*T//2N)`, for any length T. Arguments that are not
    listed here are those of `wrap_ring_attn_func`; all masks are allowed.

    Args:
        shard_lens: tokens that every block passes, in its layout, where they differ.
        layout: "contiguous": q, k, v are contiguous shards and so are the results; the op moves the
            rows itself. "zigzag": this rank
            passes its two chunks one after the other, and gets them; nothing is moved. See
            `zigzag_shard`, `zigzag_unshard` and `zigzag_positions`.

    Source: zhuzilin, "ring-flash-attention"; Llama 3 report, arXiv 2407.21783, section 3.3.2.
    """
    return context_parallel_attention(
        "wrap_zigzag_attn_func",
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        mask=mask,
        process_group=process_group,
        return_lse=return_lse,
        shard_lens=shard_lens,
        exchange=exchange,
        kernel=kernel,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        dropout_p=dropout_p,
        alibi_slopes=alibi_slopes,
        bias=bias,
        softcap=softcap,
        sinks=sinks,
        dropout_seed=dropout_seed,
        layout=layout,
        layouts=LAYOUTS_OF_ZIGZAG,
    )


def zigzag_shard(
    x: Tensor,
    process_group: ProcessGroupLike | None = None,
    *,
    dim: int = 1,
    shard_lens: Sequence[int] | None = None,
) -> Tensor:
    """This rank's contiguous shard in, its two zigzag chunks out; rows move between the ranks.

    For a model that keeps its activations in zigzag order: shard the token ids or embeddings once,
    use `layout="zigzag"` in every layer, unshard the result once. Differentiable; any dtype.

    Args:
        x: any tensor whose tokens lie along `dim`.
        process_group: as in `wrap_ring_attn_func`; None returns x as it is.
        dim: the token dimension.
        shard_lens: tokens of every contiguous shard where they differ.

    Returns:
        x with the tokens of chunks r and 2N-1-r of 2N along `dim`.
    """
    return _relayout("zigzag_shard", x, process_group, dim, shard_lens, "contiguous", "zigzag")


def zigzag_unshard(
    x: Tensor,
    process_group: ProcessGroupLike | None = None,
    *,
    dim: int = 1,
    shard_lens: Sequence[int] | None = None,
) -> Tensor:
    """The inverse of `zigzag_shard`: two zigzag chunks in, this rank's contiguous shard out.

    `shard_lens` are again the lengths of the contiguous shards.
    """
    return _relayout("zigzag_unshard", x, process_group, dim, shard_lens, "zigzag", "contiguous")


def zigzag_positions(
    total_tokens: int,
    process_group: ProcessGroupLike | None = None,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Positions in the whole sequence of the tokens this rank holds in zigzag order, for RoPE.

    Args:
        total_tokens: tokens over all ranks.
        process_group: as in `wrap_ring_attn_func`, or a mesh of (sequence, heads), whose rows share
            the two chunks that one rank would hold.

    Returns:
        int64 [tokens of this rank].
    """
    check_total("total_tokens", total_tokens)
    rows, columns, row, column = mesh_place(*mesh_strings(process_group))
    layout = SharedUnits(Zigzag(total_tokens, rows), columns)
    return token_index(layout.positions(row * columns + column), device)


def _relayout(
    op: str,
    x: Tensor,
    process_group: ProcessGroupLike | None,
    dim: int,
    shard_lens: Sequence[int] | None,
    source: str,
    target: str,
) -> Tensor:
    group = group_string(process_group)
    place = find_place(group)
    with refusing_together(group, op):
        dim = check_dim(x, dim)
        lens = check_shard_lens("shard_lens", shard_lens, place.world_size)
        if lens and place.world_size == 1:
            check_own_length("shard_lens", lens, place.block, x.shape[dim])
    if place.world_size == 1:
        return x
    everybody = lens or [x.shape[dim]] * place.world_size
    new_len = LAYOUTS[target].for_shards(everybody).shard_lens[place.block]
    moved, _ = relayout_op(x, None, dim, op, group, lens, source, target, new_len)
    return moved
