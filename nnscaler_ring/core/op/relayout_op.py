"""Rows between layouts as a torch.library op; the group goes in as a string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnscaler_ring.core.op.call import RelayoutCall, describe, plan_relayout
from nnscaler_ring.core.op.prepare import transport_of
from nnscaler_ring.core.ranks.agreement import agree, refusing_together
from nnscaler_ring.core.ranks.groups import find_place
from nnscaler_ring.core.ranks.relayout import move_rows
from nnscaler_ring.core.ranks.transport import connect

RELAYOUT_SCHEMA = (
    "(Tensor x, Tensor? number, int dim, str op, str group, SymInt[]? shard_lens, str source, "
    "str target, SymInt new_len) -> (Tensor, Tensor)"
)


@torch.library.custom_op("nnscaler_ring::relayout", mutates_args=(), schema=RELAYOUT_SCHEMA)
def relayout_op(
    x: Tensor,
    number: Tensor | None,
    dim: int,
    op: str,
    group: str,
    shard_lens: Sequence[int] | None,
    source: str,
    target: str,
    new_len: int,
) -> tuple[Tensor, Tensor]:
    """x with its rows along `dim`, `new_len` afterwards, as the target layout has them.

    `number`: of the call whose backward pass this is, int64 [1]; None for a call of its own.
    `shard_lens` are the lengths of the contiguous shards, whichever side is contiguous. The second
    result is the number of the call, on the CPU.
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
    entered = agree(
        group,
        call,
        op,
        lambda: describe(call),
        tag=plan.tag,
        direction="forward" if number is None else "backward",
        number=None if number is None else int(number.item()),
    )
    connect(group, x.device)
    with entered:
        (moved,) = move_rows([(x, dim)], plan.moves, transport_of(place, entered))
    return moved, torch.full((1,), entered.number)


@relayout_op.register_fake
def _(x: Tensor, number: Tensor | None, dim: int, *options: Any) -> tuple[Tensor, Tensor]:
    moved = x.new_empty(*x.shape[:dim], options[-1], *x.shape[dim + 1 :])
    return moved, torch.empty(1, dtype=torch.int64)


def _save_relayout(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, *ctx.options = inputs
    ctx.old_len = x.shape[ctx.options[0]]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _relayout_gradient(ctx: Any, dx: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    dim, op, group, shard_lens, source, target, _ = ctx.options
    (number,) = ctx.saved_tensors
    back, _ = relayout_op(dx, number, dim, op, group, shard_lens, target, source, ctx.old_len)
    return (back, None, *(None,) * len(ctx.options))


relayout_op.register_autograd(_relayout_gradient, setup_context=_save_relayout)
