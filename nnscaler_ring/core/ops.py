"""The engine as torch.library ops, so that compile, checkpointing and export see whole calls.

A group goes in as a string and `cu_seqlens` as tensors whose values are read only here.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from nnscaler_ring.core.checks import check_own_length
from nnscaler_ring.core.documents import documents_of, total_of
from nnscaler_ring.core.engine import attention_backward, attention_forward
from nnscaler_ring.core.groups import ALONE, Place, find_place, group_state
from nnscaler_ring.core.kernels import AttentionKernel, Problem, select_kernel
from nnscaler_ring.core.online_softmax import accumulation_dtype
from nnscaler_ring.core.relayout import move_rows
from nnscaler_ring.core.schedule import Mask
from nnscaler_ring.core.transport import Transport


class Options(NamedTuple):
    """What an attention op takes beside its tensors, in the order of `OPTIONS_SCHEMA`.

    `shard_lens` None: equal shards. `compute_len`: this rank's query rows in `q_layout`.
    `left` and `right`: the mask, in tokens, UNBOUNDED for none.
    """

    op: str
    group: str
    shard_lens: Sequence[int] | None
    shard_lens_k: Sequence[int] | None
    caller_layout: str
    q_layout: str
    k_layout: str
    compute_len: int
    softmax_scale: float
    left: int
    right: int
    exchange: str
    kernel: str
    deterministic: bool


OPTIONS_SCHEMA = (
    "str op, str group, SymInt[]? shard_lens, SymInt[]? shard_lens_k, str caller_layout, "
    "str q_layout, str k_layout, SymInt compute_len, float softmax_scale, SymInt left, "
    "SymInt right, str exchange, str kernel, bool deterministic"
)

FORWARD_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    f"{OPTIONS_SCHEMA}) -> (Tensor out, Tensor softmax_lse, Tensor, Tensor, Tensor)"
)
"""The last three are q, out, softmax_lse in `q_layout`, for the backward pass; empty where that is
the caller's layout."""

BACKWARD_SCHEMA = (
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    f"Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, {OPTIONS_SCHEMA}) -> (Tensor, Tensor, Tensor)"
)


RELAYOUT_SCHEMA = (
    "(Tensor x, int dim, str op, str group, SymInt[]? shard_lens, str source, str target, "
    "SymInt new_len) -> Tensor"
)


@torch.library.custom_op("nnscaler_ring::attention", mutates_args=(), schema=FORWARD_SCHEMA)
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    """Attention of q, k, v as the caller holds them, dense or packed: see FORWARD_SCHEMA."""
    chosen = Options(*options)
    run = _prepare(q, q, k, v, cu_seqlens_q, cu_seqlens_k, chosen)
    transport = run.transport("forward")
    packed = q.dim() == 3
    q, k, v = _dense(packed, q, k, v)
    if run.plan.moves_in is not None:
        q = move_rows(q, 1, run.plan.moves_in, transport)
    out, lse = attention_forward(
        q,
        k,
        v,
        exchange=run.plan.exchange.start(transport),
        kernel=run.kernel,
        softmax_scale=chosen.softmax_scale,
    )
    if run.plan.moves_out is None:
        out, lse = _as_given(packed, out, lse)
        return out, lse, q.new_empty(0), out.new_empty(0), lse.new_empty(0)
    moves = run.plan.moves_out
    results = move_rows(out, 1, moves, transport), move_rows(lse, 2, moves, transport)
    out, lse, *moved = _as_given(packed, *results, q, out, lse)
    return out, lse, *moved


@attention_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    chosen = Options(*options)
    *batch, tokens, num_heads, head_dim = q.shape
    lse_dtype = accumulation_dtype(q.dtype)
    out = q.new_empty(*batch, tokens, num_heads, v.shape[-1])
    lse = q.new_empty(*batch, num_heads, tokens, dtype=lse_dtype)
    if chosen.caller_layout == chosen.q_layout:
        return out, lse, q.new_empty(0), out.new_empty(0), lse.new_empty(0)
    return (
        out,
        lse,
        q.new_empty(*batch, chosen.compute_len, num_heads, head_dim),
        q.new_empty(*batch, chosen.compute_len, num_heads, v.shape[-1]),
        q.new_empty(*batch, num_heads, chosen.compute_len, dtype=lse_dtype),
    )


@torch.library.custom_op(
    "nnscaler_ring::attention_backward", mutates_args=(), schema=BACKWARD_SCHEMA
)
def attention_backward_op(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the caller's layout; q, out, softmax_lse come in `q_layout`."""
    chosen = Options(*options)
    run = _prepare(dout, q, k, v, cu_seqlens_q, cu_seqlens_k, chosen)
    transport = run.transport("backward")
    packed = q.dim() == 3
    dout, q, k, v, out, softmax_lse = _dense(packed, dout, q, k, v, out, softmax_lse)
    if run.plan.moves_in is not None:
        dout = move_rows(dout, 1, run.plan.moves_in, transport)
    dq, dk, dv = attention_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        exchange=run.plan.exchange.start(transport),
        kernel=run.kernel,
        softmax_scale=chosen.softmax_scale,
    )
    if run.plan.moves_out is not None:
        dq = move_rows(dq, 1, run.plan.moves_out, transport)
    dq, dk, dv = _as_given(packed, dq, dk, dv)
    return dq, dk, dv


@attention_backward_op.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *batch, tokens, num_heads, _ = dout.shape
    dq = q.new_empty(*batch, tokens, num_heads, q.shape[-1])
    return dq, k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *options = inputs
    out, softmax_lse, *moved = output
    chosen = Options(*options)
    if chosen.caller_layout != chosen.q_layout:
        q, out, softmax_lse = moved
    ctx.save_for_backward(q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _attention_gradients(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dlse is not None:
        raise NotImplementedError(
            f"{ctx.options[0]}: gradients through softmax_lse are not implemented yet; "
            "detach the softmax_lse that return_lse=True gives."
        )
    rest = (None,) * (2 + len(ctx.options))
    if dout is None:
        return (None, None, None, *rest)
    return (*attention_backward_op(dout, *ctx.saved_tensors, *ctx.options), *rest)


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
    return move_rows(x, dim, plan.moves, _transport(group, place, op, plan.tag))


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
        return _transport(self.options.group, self.place, op, self.plan.tag)


def _prepare(
    held: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    options: Options,
) -> _Run:
    """Plan the call and agree on it with the other ranks; nothing has moved before that.

    `held` has this rank's query rows as the caller holds them; q may have them as computed.
    """
    place = find_place(options.group)
    with refusing_together(options.group, options.op):
        call = _call(held.shape[-3], q, k, v, cu_seqlens_q, cu_seqlens_k, options, place)
        kernel = select_kernel(options.kernel, _problem(call))
        plan = plan_call(call, place.block)
    agree(options.group, call, options.op, lambda: describe(call))
    return _Run(place, plan, kernel, options)


def _call(
    rows: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    options: Options,
    place: Place,
) -> Call:
    documents_q, documents_k = (
        None if cu is None else documents_of(cu) for cu in (cu_seqlens_q, cu_seqlens_k)
    )
    lens = _lens("shard_lens", options.shard_lens, place, rows)
    lens_k = options.shard_lens_k
    if lens_k is None and (documents_k is None or total_of(documents_k) == sum(lens)):
        lens_k = lens
    return Call(
        op=options.op,
        block_order=place.members,
        shard_lens=lens,
        shard_lens_k=_lens("shard_lens_k", lens_k, place, k.shape[-3]),
        batch=1 if q.dim() == 3 else q.shape[0],
        num_heads=q.shape[-2],
        num_kv_heads=k.shape[-2],
        head_dim=q.shape[-1],
        v_head_dim=v.shape[-1],
        dtype=q.dtype,
        device_type=q.device.type,
        softmax_scale=options.softmax_scale,
        mask=Mask(options.left, options.right),
        caller_layout=options.caller_layout,
        q_layout=options.q_layout,
        k_layout=options.k_layout,
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
    )


def _lens(name: str, lens: Sequence[int] | None, place: Place, rows: int) -> tuple[int, ...]:
    """The rows of every block; None means that all have as many as this one."""
    if lens is None:
        return (rows,) * place.world_size
    check_own_length(name, lens, place.block, rows)
    return tuple(lens)


def _transport(group: str, place: Place, op: str, tag: int) -> Transport:
    return Transport(place, None if group == ALONE else group_state(group).traffic, op, tag)


def _dense(packed: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Packed tensors with a batch of one; others as they are."""
    return tuple(x.unsqueeze(0) for x in tensors) if packed else tensors


def _as_given(packed: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Undo `_dense`."""
    return tuple(x.squeeze(0) for x in tensors) if packed else tensors
