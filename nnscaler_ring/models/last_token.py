"""The last token of a sequence, on every rank, wherever it lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler_ring.core.ranks.groups import Place, find_place, group_string

if TYPE_CHECKING:
    from nnscaler_ring.core.ranks.groups import ProcessGroupLike


def last_token(
    x: Tensor,
    process_group: ProcessGroupLike | None = None,
    shard_lens: Sequence[int] | None = None,
) -> Tensor:
    """Return row -1 of the whole sequence, of x [batch, tokens, width], as [batch, width].

    Every rank gets a copy. As everywhere in this package the loss is the sum of the ranks' losses:
    the owner's gradient is the sum of the gradients of all copies. Ranks that compute the same loss
    from it divide it by the number of ranks.

    Args:
        x: the whole sequence, or this rank's contiguous shard.
        shard_lens: tokens of every block where they differ; the last may be empty.
    """
    if process_group is None:
        return x[:, -1]
    place = find_place(group_string(process_group))
    lens = list(shard_lens or [x.shape[1]] * place.world_size)
    owner = max((block for block, tokens in enumerate(lens) if tokens), default=None)
    if owner is None:
        raise ValueError("the sequence must have a token, got shards without any.")
    out: Tensor = _LastToken.apply(x, place, owner)
    return out


class _LastToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Place, owner: int) -> Tensor:
        ctx.shape, ctx.place, ctx.owner = x.shape, place, owner
        row = x[:, -1].contiguous() if place.block == owner else x.new_empty(x.shape[0], x.shape[2])
        dist.broadcast(row, src=place.global_rank(owner), group=place.group)
        return row

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        total = dout.contiguous().clone()
        dist.all_reduce(total, group=ctx.place.group)
        dx = dout.new_zeros(ctx.shape)
        if ctx.place.block == ctx.owner:
            dx[:, -1] = total
        return dx, None, None
