"""A call that a whole op computes: checked, agreed on, its rows moved there and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnscaler_ring.core.op.call import describe, plan_call
from nnscaler_ring.core.op.options import Extras, Options
from nnscaler_ring.core.op.prepare import call_of, transport_of
from nnscaler_ring.core.op.whole_op import load_whole_op
from nnscaler_ring.core.plan.layout import LAYOUTS
from nnscaler_ring.core.plan.moves import Moves, plan_moves
from nnscaler_ring.core.ranks.agreement import agree, refusing_together
from nnscaler_ring.core.ranks.calls import Pass
from nnscaler_ring.core.ranks.groups import Place, find_place
from nnscaler_ring.core.ranks.relayout import move_rows
from nnscaler_ring.core.ranks.transport import Transport, connect


def whole_op_attention(
    q: Tensor, k: Tensor, v: Tensor, extras: Extras, options: Options, *, return_lse: bool
) -> Tensor:
    """Attention of q, k, v as the caller holds them, by the whole op `options.kernel`.

    Raises:
        ValueError: the whole op refuses; with its reason.
        NotImplementedError: under torch.compile, which cannot look into the other package.
    """
    name = options.kernel
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            f"kernel={name!r} cannot be traced by torch.compile; call it outside, or use "
            "kernel='auto'."
        )
    place = find_place(options.group)
    whole_op = load_whole_op(name)
    with refusing_together(options.group, options.op):
        call = call_of(q.shape[-3], q, k, v, extras, options, place)
        reason = whole_op.supports(call, place)
        if reason is None and return_lse:
            reason = "it does not return softmax_lse: return_lse must be False"
        if reason is not None:
            raise ValueError(
                f"kernel={name!r} cannot compute this call ({reason}); kernel='auto' computes any."
            )
        tag = plan_call(call, place.block).tag

    def enter(number: int | None = None) -> Pass:
        return agree(
            options.group,
            (call, options.wants_gradient),
            options.op,
            lambda: {**describe(call), "wants_gradient": str(options.wants_gradient)},
            tag=tag,
            direction="forward" if number is None else "backward",
            number=number,
        )

    entered = enter()
    connect(options.group, q.device)
    with entered:
        held = LAYOUTS[call.caller_layout].for_shards(call.shard_lens)
        wanted = whole_op.layout(call)
        if held == wanted:
            return whole_op.attention(q, k, v, call, place)
        way = _Way(place, entered.number, enter)
        transport = transport_of(place, entered)
        there = plan_moves(held, wanted, place.block)
        back = plan_moves(wanted, held, place.block)
        q, k, v = _MovedRows.apply(there, back, transport, way, q, k, v)
        out = whole_op.attention(q, k, v, call, place)
        (out,) = _MovedRows.apply(back, there, transport, way, out)
    return out


class _Way(NamedTuple):
    """How gradients enter a pass of their own: `enter` takes the number of the call."""

    place: Place
    number: int
    enter: Callable[[int], Pass]


class _MovedRows(torch.autograd.Function):
    """Tensors [..., rows, heads, head_dim] with their rows moved; their gradients move back."""

    @staticmethod
    def forward(
        ctx: Any, there: Moves, back: Moves, transport: Transport, way: _Way, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.back, ctx.way = back, way
        return _moved(there, transport, tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        way = ctx.way
        with way.enter(way.number) as entered:
            moved = _moved(ctx.back, transport_of(way.place, entered), gradients)
        return None, None, None, None, *moved


def _moved(moves: Moves, transport: Transport, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(move_rows([(x, x.dim() - 3) for x in tensors], moves, transport))
