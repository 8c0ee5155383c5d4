"""The engine as torch.library ops, so that compile, checkpointing and export see whole calls.

A group goes in as a string and `cu_seqlens` as tensors whose values are read only here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnscaler_ring.core.agreement import agree, refusing_together
from nnscaler_ring.core.call import (
    Call,
    Plan,
    RelayoutCall,
    describe,
    plan_call,
    plan_relayout,
)
from nnscaler_ring.core.checks import check_bias_keys, check_own_length
from nnscaler_ring.core.documents import documents_of, total_of
from nnscaler_ring.core.dropout import Dropout, agreed_seed
from nnscaler_ring.core.engine import attention_backward, attention_forward
from nnscaler_ring.core.groups import ALONE, Place, find_place, group_state
from nnscaler_ring.core.kernels import AttentionKernel, Problem, select_kernel
from nnscaler_ring.core.online_softmax import accumulation_dtype
from nnscaler_ring.core.relayout import move_rows
from nnscaler_ring.core.schedule import Mask
from nnscaler_ring.core.scores import Scores
from nnscaler_ring.core.transport import Transport


class Options(NamedTuple):
    """What an attention op takes beside its tensors, in the order of `OPTIONS_SCHEMA`.

    `shard_lens` None: equal shards. `compute_len`: this rank's query rows in `compute_layout`.
    `left` and `right`: the mask, in tokens, UNBOUNDED for none. `bias_gradient`: bias wants one.
    `same_seed`: the caller gave dropout_seed, so all ranks must hold the same. `first_batch` and
    `first_head`: as in `DropoutSeed`.
    """

    op: str
    group: str
    shard_lens: Sequence[int] | None
    shard_lens_k: Sequence[int] | None
    caller_layout: str
    compute_layout: str
    compute_len: int
    softmax_scale: float
    left: int
    right: int
    softcap: float
    bias_gradient: bool
    dropout_p: float
    same_seed: bool
    first_batch: int
    first_head: int
    exchange: str
    kernel: str
    deterministic: bool


OPTIONS_SCHEMA = (
    "str op, str group, SymInt[]? shard_lens, SymInt[]? shard_lens_k, str caller_layout, "
    "str compute_layout, SymInt compute_len, float softmax_scale, SymInt left, SymInt right, "
    "float softcap, bool bias_gradient, float dropout_p, bool same_seed, SymInt first_batch, "
    "SymInt first_head, str exchange, str kernel, bool deterministic"
)


class Extras(NamedTuple):
    """Tensors that an attention op takes beside q, k, v, in the order of `EXTRAS_SCHEMA`."""

    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    alibi_slopes: Tensor | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    dropout_seed: Tensor | None = None


EXTRAS_SCHEMA = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? alibi_slopes, Tensor? bias, "
    "Tensor? sinks, Tensor? dropout_seed"
)

FORWARD_SCHEMA = (
    f"(Tensor q, Tensor k, Tensor v, {EXTRAS_SCHEMA}, {OPTIONS_SCHEMA}) -> "
    "(Tensor out, Tensor softmax_lse, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
"""The last seven are for the backward pass: the seed that the ranks agreed on; and q, k, v, out,
softmax_lse, bias in `compute_layout`. They are empty where there is no dropout, no bias, or where
`compute_layout` is the caller's layout."""

BACKWARD_SCHEMA = (
    "(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    f"{EXTRAS_SCHEMA}, {OPTIONS_SCHEMA}) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)"
)


RELAYOUT_SCHEMA = (
    "(Tensor x, int dim, str op, str group, SymInt[]? shard_lens, str source, str target, "
    "SymInt new_len) -> Tensor"
)


@torch.library.custom_op("nnscaler_ring::attention", mutates_args=(), schema=FORWARD_SCHEMA)
def attention_op(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """Attention of q, k, v as the caller holds them, dense or packed: see FORWARD_SCHEMA."""
    extras, options = _split(others)
    run = _prepare(q.shape[-3], q, k, v, extras, options)
    transport = run.transport("forward")
    packed = q.dim() == 3
    seed = agreed_seed(extras.dropout_seed, transport, must_be_same=options.same_seed)
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
        exchange=run.plan.exchange.start(transport),
        kernel=run.kernel,
        scores=run.scores(extras, bias, seed),
        sinks=extras.sinks,
    )
    seed = q.new_empty(0, dtype=torch.int64) if seed is None else seed.clone()
    if run.plan.moves_out is None:
        out, lse = _as_given(packed, out, lse)
        return out, lse, seed, *_nothing(q, k, v, out, lse, bias)
    results = move_rows([(out, 1), (lse, 2)], run.plan.moves_out, transport)
    bias = q.new_empty(0) if bias is None else bias
    moved = _as_given(packed, *results, q, k, v, out, lse, bias)
    return moved[0], moved[1], seed, *moved[2:]


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
    extras, options = _split(others)
    *batch, tokens, num_heads, head_dim = q.shape
    lse_dtype = accumulation_dtype(q.dtype)
    out = q.new_empty(*batch, tokens, num_heads, v.shape[-1])
    lse = q.new_empty(*batch, num_heads, tokens, dtype=lse_dtype)
    seed = q.new_empty([0] if extras.dropout_seed is None else [], dtype=torch.int64)
    bias = extras.bias
    if options.caller_layout == options.compute_layout:
        return out, lse, seed, *_nothing(q, k, v, out, lse, bias)
    rows = options.compute_len
    return (
        out,
        lse,
        seed,
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
    *others: Any,
) -> tuple[Tensor, ...]:
    """Gradients in the caller's layout; q, k, v, out, softmax_lse, bias come in compute_layout."""
    extras, options = _split(others)
    rows = _query_rows(dout, dlse)
    run = _prepare(rows, q, k, v, extras, options, lse_gradient=dlse is not None)
    transport = run.transport("backward")
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
        dout,
        dlse,
        q,
        k,
        v,
        out,
        softmax_lse,
        exchange=run.plan.exchange.start(transport),
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
    *others: Any,
) -> tuple[Tensor, ...]:
    extras, options = _split(others)
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
    out, softmax_lse, seed, *moved = output
    extras, options = _split(others)
    if extras.dropout_seed is not None:
        extras = extras._replace(dropout_seed=seed)
    if options.caller_layout != options.compute_layout:
        q, k, v, out, softmax_lse, bias = moved
        if extras.bias is not None:
            extras = extras._replace(bias=bias)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(q, k, v, out, softmax_lse, *extras)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _attention_gradients(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    rest = (None,) * len(ctx.options)
    if dout is None and dlse is None:
        return (None,) * (3 + len(Extras._fields)) + rest
    saved = ctx.saved_tensors  # once: a checkpoint gives them out once
    dq, dk, dv, dbias, dsinks = attention_backward_op(dout, dlse, *saved, *ctx.options)
    sinks = Extras(*saved[5:]).sinks
    given = Extras(
        bias=dbias if ctx.options.bias_gradient else None,
        sinks=None if sinks is None else dsinks,
    )
    return (dq, dk, dv, *given, *rest)


attention_op.register_autograd(_attention_gradients, setup_context=_save_for_backward)


@torch.library.custom_op("nnscaler_ring::relayout", mutates_args=(), schema=RELAYOUT_SCHEMA)
def relayout_op(
    x: Tensor,
    dim: int,
    op: str,
    group: str,
    shard_lens: Sequence[int] | None,
    source: str,
    target: str,
    new_len: int,
) -> Tensor:
    """x with its rows along `dim`, `new_len` afterwards, as the target layout has them.

    `shard_lens` are the lengths of the contiguous shards, whichever side is contiguous.
    """
    place = find_place(group)
    with refusing_together(group, op):
        call = RelayoutCall(
            op=op,
            block_order=place.members,
            shard_lens=tuple(shard_lens or [x.shape[dim]] * place.world_size),
            dim=dim,
            other_sizes=(*x.shape[:dim], *x.shape[dim + 1 :]),
            dtype=x.dtype,
            device_type=x.device.type,
            source=source,
            target=target,
        )
        plan = plan_relayout(call, place.block, x.shape[dim])
    agree(group, call, op, lambda: describe(call))
    return move_rows([(x, dim)], plan.moves, transport_of(group, place, op, plan.tag))[0]


@relayout_op.register_fake
def _(x: Tensor, dim: int, *options: Any) -> Tensor:
    return x.new_empty(*x.shape[:dim], options[-1], *x.shape[dim + 1 :])


def _save_relayout(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.options = inputs
    ctx.old_len = x.shape[ctx.options[0]]


def _relayout_gradient(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
    dim, op, group, shard_lens, source, target, _ = ctx.options
    back = relayout_op(dx, dim, op, group, shard_lens, target, source, ctx.old_len)
    return (back, *(None,) * len(ctx.options))


relayout_op.register_autograd(_relayout_gradient, setup_context=_save_relayout)


class _Run(NamedTuple):
    """An attention call on this rank, agreed on and ready to go."""

    place: Place
    plan: Plan
    kernel: AttentionKernel
    options: Options

    def transport(self, direction: str) -> Transport:
        """For the messages of one pass."""
        op = f"{self.options.op} {direction}"
        return transport_of(self.options.group, self.place, op, self.plan.tag)

    def scores(self, extras: Extras, bias: Tensor | None, seed: Tensor | None) -> Scores:
        """For one pass; bias [batch or 1, num_heads or 1, computed rows, all keys]."""
        options, slopes = self.options, extras.alibi_slopes
        dropout = None
        if options.dropout_p and seed is not None:
            dropout = Dropout(options.dropout_p, seed, options.first_batch, options.first_head)
        return Scores(
            options.softmax_scale,
            self.plan.schedule,
            self.place.block,
            softcap=options.softcap,
            alibi_slopes=None if slopes is None else slopes.view(-1, slopes.shape[-1]),
            bias=bias,
            needs_dbias=options.bias_gradient,
            dropout=dropout,
        )


def _prepare(
    rows: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extras: Extras,
    options: Options,
    *,
    lse_gradient: bool | None = None,
) -> _Run:
    """Plan the call and agree on it with the other ranks; nothing has moved before that.

    `rows`: this rank's query rows as the caller holds them; q may have them as computed.
    `lse_gradient`: whether a gradient of softmax_lse comes in; None in the forward pass.
    """
    place = find_place(options.group)
    with refusing_together(options.group, options.op):
        call = _call(rows, q, k, v, extras, options, place, lse_gradient)
        kernel = select_kernel(options.kernel, _problem(call))
        plan = plan_call(call, place.block)
    agree(options.group, call, options.op, lambda: describe(call))
    return _Run(place, plan, kernel, options)


def _call(
    rows: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extras: Extras,
    options: Options,
    place: Place,
    lse_gradient: bool | None,
) -> Call:
    documents_q, documents_k = (
        None if cu is None else documents_of(cu)
        for cu in (extras.cu_seqlens_q, extras.cu_seqlens_k)
    )
    moved = options.caller_layout != options.compute_layout
    lens = lens_of_blocks("shard_lens", options.shard_lens, place, rows)
    lens_k = options.shard_lens_k
    if lens_k is None and (documents_k is None or total_of(documents_k) == sum(lens)):
        lens_k = lens
    lens_k = lens_of_blocks("shard_lens_k", lens_k, place, rows if moved else k.shape[-3])
    bias, slopes = extras.bias, extras.alibi_slopes
    if bias is not None:
        check_bias_keys(bias, sum(lens_k))
    return Call(
        op=options.op,
        block_order=place.members,
        shard_lens=lens,
        shard_lens_k=lens_k,
        batch=1 if q.dim() == 3 else q.shape[0],
        num_heads=q.shape[-2],
        num_kv_heads=k.shape[-2],
        head_dim=q.shape[-1],
        v_head_dim=v.shape[-1],
        dtype=q.dtype,
        device_type=q.device.type,
        softmax_scale=options.softmax_scale,
        mask=Mask(options.left, options.right),
        softcap=options.softcap,
        alibi_slopes=None if slopes is None else tuple(slopes.shape),
        bias=None if bias is None else (*bias.shape[:-2], bias.dtype),
        bias_gradient=options.bias_gradient,
        sinks=extras.sinks is not None,
        dropout_p=options.dropout_p,
        dropout_seed="given" if options.same_seed else "drawn",
        # Its rows move where the layouts differ; elsewhere it is each rank's own affair.
        lse_gradient=lse_gradient if moved else None,
        caller_layout=options.caller_layout,
        compute_layout=options.compute_layout,
        exchange=options.exchange,
        kernel=options.kernel,
        deterministic=options.deterministic,
        cu_seqlens_q=documents_q,
        cu_seqlens_k=documents_k,
    )


def _problem(call: Call) -> Problem:
    return Problem(
        device_type=call.device_type,
        dtype=call.dtype,
        num_heads=call.num_heads,
        num_kv_heads=call.num_kv_heads,
        head_dim=call.head_dim,
        v_head_dim=call.v_head_dim,
        deterministic=call.deterministic,
        softcap=call.softcap > 0,
        alibi=call.alibi_slopes is not None,
        bias=call.bias is not None,
        dropout=call.dropout_p > 0,
    )


def lens_of_blocks(
    name: str, lens: Sequence[int] | None, place: Place, rows: int
) -> tuple[int, ...]:
    """The rows of every block; None means that all have as many as this one."""
    if lens is None:
        return (rows,) * place.world_size
    check_own_length(name, lens, place.block, rows)
    return tuple(lens)


def transport_of(group: str, place: Place, op: str, tag: int) -> Transport:
    """For the messages of one pass over a group."""
    return Transport(place, None if group == ALONE else group_state(group).traffic, op, tag)


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


def _split(others: Sequence[Any]) -> tuple[Extras, Options]:
    """The arguments after q, k, v."""
    count = len(Extras._fields)
    return Extras(*others[:count]), Options(*others[count:])


def _nothing(*tensors: Tensor | None) -> Iterator[Tensor]:
    """No elements, of each dtype; tensors[0] stands for what is None."""
    for x in tensors:
        yield (tensors[0] if x is None else x).new_empty(0)  # type: ignore[union-attr]
