"""Rows between contiguous shards and zigzag order within every document, as a torch.library op."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nnscaler_ring.core.op.call import RelayoutCall, describe, tag_of
from nnscaler_ring.core.op.checks import check_cu_seqlens_values
from nnscaler_ring.core.op.documents import cu_seqlens_of, documents_of
from nnscaler_ring.core.op.prepare import transport_of
from nnscaler_ring.core.plan.layout import Contiguous, ZigzagDocuments
from nnscaler_ring.core.plan.moves import plan_moves
from nnscaler_ring.core.ranks.agreement import agree, refusing_together
from nnscaler_ring.core.ranks.groups import find_place
from nnscaler_ring.core.ranks.relayout import move_rows
from nnscaler_ring.core.ranks.transport import connect


@torch.library.custom_op(
    "nnscaler_ring::shuffle_documents",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor cu_seqlens, Tensor? number, str op, str group, bool back) -> "
        "(Tensor, Tensor)"
    ),
)
def shuffle_documents_op(
    x: Tensor, cu_seqlens: Tensor, number: Tensor | None, op: str, group: str, back: bool
) -> tuple[Tensor, Tensor]:
    """x with its first dimension's rows in zigzag order of each document, or, `back`, as before.

    Documents must divide by twice the ranks, so that all ranks hold as many rows in either order.
    `number`: of the call whose backward pass this is, int64 [1]; None for a call of its own. The
    second result is the number of the call, on the CPU.
    """
    place = find_place(group)
    ranks, rows = place.world_size, len(x)
    with refusing_together(group, op):
        bounds = cu_seqlens_of(documents_of(cu_seqlens))
        check_cu_seqlens_values("cu_seqlens", bounds, rows * ranks)
        lengths = [stop - start for start, stop in pairwise(bounds)]
        if any(length % (2 * ranks) for length in lengths):
            raise ValueError(
                f"cu_seqlens must give documents that divide by {2 * ranks}, twice the ranks, got "
                f"lengths {lengths}; pad them, or call wrap_ring_attn_varlen_func, which needs no "
                "shuffle."
            )
        names = ("contiguous", f"zigzag within documents {bounds}")
        call = RelayoutCall(
            op=op,
            block_order=place.members,
            shard_lens=(rows,) * ranks,
            dim=0,
            other_sizes=tuple(x.shape[1:]),
            dtype=x.dtype,
            device_type=x.device.type,
            source=names[back],
            target=names[not back],
        )
        orders = Contiguous.for_shards((rows,) * ranks), ZigzagDocuments(bounds, ranks)
        moves = plan_moves(orders[back], orders[not back], place.block)
    entered = agree(
        group,
        call,
        op,
        lambda: describe(call),
        tag=tag_of(call),
        direction="forward" if number is None else "backward",
        number=None if number is None else int(number.item()),
    )
    connect(group, x.device)
    with entered:
        (moved,) = move_rows([(x, 0)], moves, transport_of(place, entered))
    return moved, torch.full((1,), entered.number)


@shuffle_documents_op.register_fake
def _(x: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    moved = torch.empty_like(x, memory_format=torch.contiguous_format)
    return moved, torch.empty(1, dtype=torch.int64)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, cu_seqlens, _, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(cu_seqlens, output[1])


def _gradient(ctx: Any, dx: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    op, group, back = ctx.options
    cu_seqlens, number = ctx.saved_tensors
    moved, _ = shuffle_documents_op(dx, cu_seqlens, number, op, group, not back)
    return moved, None, None, None, None, None


shuffle_documents_op.register_autograd(_gradient, setup_context=_save)
