"""The engine as torch.library ops, so that compile, checkpointing and export see whole calls.

A group goes in as a string and `cu_seqlens` as tensors whose values are read only here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nnscaler_ring.core.engine import attention_backward, attention_forward
from nnscaler_ring.core.exchange import Performance
from nnscaler_ring.core.kernels import BackwardTensors
from nnscaler_ring.core.op.options import (
    EXTRAS_SCHEMA,
    OPTIONS_SCHEMA,
    Extras,
    arguments_of,
    split_arguments,
)
from nnscaler_ring.core.op.prepare import prepare
from nnscaler_ring.core.ranks.relayout import move_rows
from nnscaler_ring.core.scores.dropout import agreed_seed
from nnscaler_ring.core.sums.online_softmax import accumulation_dtype

FORWARD_SCHEMA = (
    f"(Tensor q, Tensor k, Tensor v, {EXTRAS_SCHEMA}, {OPTIONS_SCHEMA}) -> "
    "(Tensor out, Tensor softmax_lse, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
    "Tensor)"
)
"""The last eight are for the backward pass: the seed that the ranks agreed on; the number of the
call, int64 [1] on the CPU; and q, k, v, out, softmax_lse, bias in `compute_layout`. They are empty,
but for the number, where there is no dropout, no bias, or where `compute_layout` is the caller's
layout."""

BACKWARD_SCHEMA = (
    "(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    f"Tensor number, {EXTRAS_SCHEMA}, {OPTIONS_SCHEMA}) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)"
)


@torch.library.custom_op("nnscaler_ring::attention", mutates_args=(), schema=FORWARD_SCHEMA)
def attention_op(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """Attention of q, k, v as the caller holds them, dense or packed: see FORWARD_SCHEMA."""
    extras, options = split_arguments(others)
    run = prepare(q.shape[-3], q, k, v, extras, options)
    with run.entered:
        transport = run.transport()
        packed = q.dim() == 3
        seed = agreed_seed(extras.dropout_seed, transport, q.device, must_be_same=options.same_seed)
        q, k, v = _dense(packed, q, k, v)
        bias = _dense_bias(packed, extras.bias)
        moves = run.plan.moves_in
        if moves is not None:
            q, k, v, *moved_bias = move_rows(
                [(q, 1), (k, 1), (v, 1), *([] if bias is None else [(bias, 2)])], moves, transport
            )
            bias = moved_bias[0] if moved_bias else None
        out, lse = attention_forward(
            q,
            k,
            v,
            exchange=Performance(run.plan.program, transport),
            kernel=run.kernel,
            scores=run.scores(extras, bias, seed),
            sinks=extras.sinks,
        )
        number = torch.full((1,), run.entered.number)
        seed = q.new_empty(0, dtype=torch.int64) if seed is None else seed.clone()
        if run.plan.moves_out is None:
            out, lse = _as_given(packed, out, lse)
            return out, lse, seed, number, *_nothing(q, k, v, out, lse, bias)
        results = move_rows([(out, 1), (lse, 2)], run.plan.moves_out, transport)
        bias = q.new_empty(0) if bias is None else bias
        moved = _as_given(packed, *results, q, k, v, out, lse, bias)
        return moved[0], moved[1], seed, number, *moved[2:]


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
    extras, options = split_arguments(others)
    *batch, tokens, num_heads, head_dim = q.shape
    lse_dtype = accumulation_dtype(q.dtype)
    out = q.new_empty(*batch, tokens, num_heads, v.shape[-1])
    lse = q.new_empty(*batch, num_heads, tokens, dtype=lse_dtype)
    seed = q.new_empty([0] if extras.dropout_seed is None else [], dtype=torch.int64)
    number = torch.empty(1, dtype=torch.int64)
    bias = extras.bias
    if options.caller_layout == options.compute_layout:
        return out, lse, seed, number, *_nothing(q, k, v, out, lse, bias)
    rows = options.compute_len
    return (
        out,
        lse,
        seed,
        number,
        q.new_empty(*batch, rows, num_heads, head_dim),
        k.new_empty(*batch, rows, *k.shape[-2:]),
        v.new_empty(*batch, rows, *v.shape[-2:]),
        q.new_empty(*batch, rows, num_heads, v.shape[-1]),
        q.new_empty(*batch, num_heads, rows, dtype=lse_dtype),
        q.new_empty(0) if bias is None else bias.new_empty(*bias.shape[:-2], rows, bias.shape[-1]),
    )


@torch.library.custom_op(
    "nnscaler_ring::attention_backward", mutates_args=(), schema=BACKWARD_SCHEMA
)
def attention_backward_op(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    number: Tensor,
    *others: Any,
) -> tuple[Tensor, ...]:
    """Gradients in the caller's layout; q, k, v, out, softmax_lse, bias come in compute_layout."""
    extras, options = split_arguments(others)
    rows = _query_rows(dout, dlse)
    run = prepare(
        rows, q, k, v, extras, options, lse_gradient=dlse is not None, number=int(number.item())
    )
    with run.entered:
        transport = run.transport()
        packed = q.dim() == 3
        if dout is None:
            dout = out.new_zeros(*out.shape[:-3], rows, *out.shape[-2:])
        dout, q, k, v, out, softmax_lse = _dense(packed, dout, q, k, v, out, softmax_lse)
        if dlse is not None:
            (dlse,) = _dense(packed, dlse.to(softmax_lse.dtype))
        if run.plan.moves_in is not None:
            tensors = [(dout, 1)] if dlse is None else [(dout, 1), (dlse, 2)]
            dout, *moved_dlse = move_rows(tensors, run.plan.moves_in, transport)
            dlse = moved_dlse[0] if moved_dlse else None
        bias = _dense_bias(packed, extras.bias)
        dq, dk, dv, dbias, dsinks = attention_backward(
            BackwardTensors(dout, dlse, q, k, v, out, softmax_lse),
            exchange=Performance(run.plan.program, transport),
            kernel=run.kernel,
            scores=run.scores(extras, bias, extras.dropout_seed),
            sinks=extras.sinks,
        )
        if dbias is not None and bias is not None:
            dbias = dbias.to(bias.dtype)
        if run.plan.moves_out is not None:
            tensors = [(dq, 1), (dk, 1), (dv, 1), *([] if dbias is None else [(dbias, 2)])]
            dq, dk, dv, *moved_dbias = move_rows(tensors, run.plan.moves_out, transport)
            dbias = moved_dbias[0] if moved_dbias else None
        dq, dk, dv = _as_given(packed, dq, dk, dv)
        dbias = q.new_empty(0) if dbias is None else dbias
        return (
            dq,
            dk,
            dv,
            dbias.squeeze(0) if packed and dbias.numel() else dbias,
            q.new_empty(0) if dsinks is None else dsinks,
        )


@attention_backward_op.register_fake
def _(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    number: Tensor,
    *others: Any,
) -> tuple[Tensor, ...]:
    extras, options = split_arguments(others)
    rows = _query_rows(dout, dlse)
    moved = options.caller_layout != options.compute_layout
    dq, dk, dv = (
        x.new_empty(*x.shape[:-3], rows if moved else x.shape[-3], *x.shape[-2:]) for x in (q, k, v)
    )
    bias, sinks = extras.bias, extras.sinks
    dbias = q.new_empty(0)
    if bias is not None and options.bias_gradient:
        dbias = bias.new_empty(*bias.shape[:-2], rows, bias.shape[-1])
    return dq, dk, dv, dbias, q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, *others = inputs
    out, softmax_lse, seed, number, *moved = output
    extras, options = split_arguments(others)
    if extras.dropout_seed is not None:
        extras = extras._replace(dropout_seed=seed)
    if options.caller_layout != options.compute_layout:
        q, k, v, out, softmax_lse, bias = moved
        if extras.bias is not None:
            extras = extras._replace(bias=bias)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(q, k, v, out, softmax_lse, number, *extras)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _attention_gradients(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    options = arguments_of(ctx.options)
    rest = (None,) * len(options)
    if dout is None and dlse is None:
        return (None,) * (3 + len(Extras._fields)) + rest
    saved = ctx.saved_tensors  # once: a checkpoint gives them out once
    dq, dk, dv, dbias, dsinks = attention_backward_op(dout, dlse, *saved, *options)
    sinks = Extras(*saved[6:]).sinks
    given = Extras(
        bias=dbias if ctx.options.bias_gradient else None,
        sinks=None if sinks is None else dsinks,
    )
    return (dq, dk, dv, *given, *rest)


attention_op.register_autograd(_attention_gradients, setup_context=_save_for_backward)


def _dense(packed: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Packed tensors with a batch of one; others as they are."""
    return tuple(x.unsqueeze(0) for x in tensors) if packed else tensors


def _as_given(packed: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Undo `_dense`."""
    return tuple(x.squeeze(0) for x in tensors) if packed else tensors


def _dense_bias(packed: bool, bias: Tensor | None) -> Tensor | None:
    return bias.unsqueeze(0) if packed and bias is not None else bias


def _query_rows(dout: Tensor | None, dlse: Tensor | None) -> int:
    """This rank's query rows as the caller holds them: dout [..., rows, h, d], dlse [..., rows]."""
    if dout is not None:
        return dout.shape[-3]
    assert dlse is not None
    return dlse.shape[-1]


def _nothing(*tensors: Tensor | None) -> Iterator[Tensor]:
    """No elements, of each dtype; tensors[0] stands for what is None."""
    for x in tensors:
        yield (tensors[0] if x is None else x).new_empty(0)  # type: ignore[union-attr]
