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
    "(Tensor x, int dim, str op, str group, SymInt[]? shard_lens, str source, str target, "
    "SymInt new_len) -> Tensor"
)


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
    connect(group, x.device)
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
