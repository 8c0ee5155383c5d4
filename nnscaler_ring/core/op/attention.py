"""What every public attention function does: check, resolve, call the op."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nnscaler_ring.core.kernels import WHOLE_OPS
from nnscaler_ring.core.op import checks
from nnscaler_ring.core.op.dilated_ops import DilatedOptions, dilated_attention_op
from nnscaler_ring.core.op.mesh import check_mesh, mesh_attention
from nnscaler_ring.core.op.ops import attention_op
from nnscaler_ring.core.op.options import Extras, Options, arguments_of
from nnscaler_ring.core.op.whole_call import whole_op_attention
from nnscaler_ring.core.plan.layout import LAYOUTS
from nnscaler_ring.core.ranks.agreement import refusing_together
from nnscaler_ring.core.ranks.groups import (
    ALONE,
    group_string,
    mesh_place,
    mesh_strings,
)
from nnscaler_ring.core.scores.dropout import DropoutSeed, seed_tensor

if TYPE_CHECKING:
    from nnscaler_ring.core.plan.dilation import HeadOffsets
    from nnscaler_ring.core.plan.masks import Mask
    from nnscaler_ring.core.ranks.groups import ProcessGroupLike

CONTIGUOUS = {"contiguous": ("contiguous", "contiguous")}


def context_parallel_attention(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    mask: Mask | str | None,
    process_group: ProcessGroupLike | None,
    return_lse: bool,
    shard_lens: Sequence[int] | None,
    shard_lens_k: Sequence[int] | None = None,
    exchange: str,
    kernel: str,
    deterministic: bool,
    return_attn_probs: bool,
    dropout_p: float,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    softcap: float,
    sinks: Tensor | None,
    dropout_seed: int | DropoutSeed | None,
    layout: str = "contiguous",
    layouts: Mapping[str, tuple[str, str]] = CONTIGUOUS,
    packed: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention over a sequence that is sharded over the ranks of a group.

    The public functions document the arguments; beside those it takes the public function's name
    and its `layouts`: by the words that `layout` may be, two names in `LAYOUTS`. The caller holds
    q, k and v in the first; where the second is another, rows move there and the result's back.
    """
    row, group = mesh_strings(process_group)
    with refusing_together(row, op), refusing_together(group, op):
        caller_layout, compute_layout = checks.check_layout(layout, layouts)
        checks.check_choices(
            exchange=exchange,
            kernel=kernel,
            deterministic=deterministic,
            return_lse=return_lse,
            return_attn_probs=return_attn_probs,
        )
        checks.check_qkv(q, k, v, packed=packed)
        check_mesh(q.shape[-2], kernel, row)
        mask_text = checks.check_mask(mask, causal, window_size, causal_default=not packed)
        scale = checks.check_scale(softmax_scale, q.shape[-1])
        softcap = checks.check_softcap(softcap)
        checks.check_alibi_slopes(alibi_slopes, q)
        checks.check_bias(bias, q)
        checks.check_sinks(sinks, q)
        dropout_p = checks.check_dropout_p(dropout_p)
        seed = checks.check_dropout_seed(dropout_seed, dropout_p)
        if packed:
            checks.check_cu_seqlens_tensors(q, cu_seqlens_q, cu_seqlens_k)
        compute_len = q.shape[-3]
        if shard_lens is not None or shard_lens_k is not None:
            rows, columns, block, _ = mesh_place(row, group)
            ranks = rows * columns
            shard_lens = checks.check_shard_lens("shard_lens", shard_lens, ranks)
            shard_lens_k = checks.check_shard_lens("shard_lens_k", shard_lens_k, ranks)
            if shard_lens is not None and row == ALONE:
                compute_len = LAYOUTS[compute_layout].for_shards(shard_lens).shard_lens[block]
    options = Options(
        op=op,
        group=group,
        shard_lens=shard_lens,
        shard_lens_k=shard_lens_k,
        caller_layout=caller_layout,
        # One device holds every layout in the same order, so nothing has to move.
        compute_layout=caller_layout if group == ALONE else compute_layout,
        compute_len=compute_len,
        softmax_scale=scale,
        mask=mask_text,
        softcap=softcap,
        bias_gradient=bias is not None and bias.requires_grad and torch.is_grad_enabled(),
        dropout_p=dropout_p,
        same_seed=seed.seed is not None,
        first_batch=seed.first_batch,
        first_head=seed.first_head,
        exchange=exchange,
        kernel=kernel,
        deterministic=deterministic,
        wants_gradient=wants_gradient(q, k, v, bias, sinks),
    )
    extras = Extras(
        cu_seqlens_q, cu_seqlens_k, alibi_slopes, bias, sinks, seed_tensor(dropout_p, seed.seed)
    )
    if kernel in WHOLE_OPS:
        return whole_op_attention(q, k, v, extras, options, return_lse=return_lse)
    if row == ALONE:
        out, softmax_lse = _attend(q, k, v, extras, options)
        return (out, softmax_lse) if return_lse else out
    with refusing_together(group, op):
        out, lse = mesh_attention(_attend, q, k, v, extras, options, row, return_lse)
    return out if lse is None else (out, lse)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, extras: Extras, options: Options
) -> tuple[Tensor, Tensor]:
    out, softmax_lse, *_ = attention_op(q, k, v, *extras, *arguments_of(options))
    return out, softmax_lse


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow, in which all ranks must then take part."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def dilated_attention(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    softmax_scale: float | None,
    causal: bool,
    head_offsets: str | HeadOffsets,
    process_group: ProcessGroupLike | None,
    return_lse: bool,
    shard_lens: Sequence[int] | None,
    exchange: str,
    kernel: str,
    chunks: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dilated attention; the public function documents the arguments.

    `chunks`: without a group, the parts that keys come in.
    """
    group = group_string(process_group)
    with refusing_together(group, op):
        checks.check_choices(
            exchange=exchange,
            kernel=kernel,
            deterministic=False,
            return_lse=return_lse,
            return_attn_probs=False,
        )
        checks.check_qkv(q, k, v, packed=False)
        checks.check_window(causal, (-1, -1))
        scale = checks.check_scale(softmax_scale, q.shape[-1])
        segments, rates = checks.check_branches(segment_lengths, dilation_rates)
        offsets = checks.check_head_offsets(head_offsets, k.shape[-2])
        assert offsets.num_kv_heads is not None, offsets  # filled in there
        if shard_lens is not None:
            world_size, *_ = mesh_place(ALONE, group)
            shard_lens = checks.check_shard_lens("shard_lens", shard_lens, world_size)
    options = DilatedOptions(
        op=op,
        group=group,
        shard_lens=shard_lens,
        segment_lengths=segments,
        dilation_rates=rates,
        causal=causal,
        head_offsets=offsets.grouping,
        first_kv_head=offsets.first_kv_head,
        all_kv_heads=offsets.num_kv_heads,
        softmax_scale=scale,
        exchange=exchange,
        kernel=kernel,
        chunks=chunks,
        wants_gradient=wants_gradient(q, k, v),
    )
    out, softmax_lse, _ = dilated_attention_op(q, k, v, *options)
    return (out, softmax_lse) if return_lse else out
