"""Who shares a sequence: a model's `process_group` and `ring_size`, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nnscaler_ring.core.plan.layout import LAYOUTS
from nnscaler_ring.core.plan.span import even_lens
from nnscaler_ring.core.ranks.groups import find_place, group_of, group_string
from nnscaler_ring.core.token_index import token_index

if TYPE_CHECKING:
    from nnscaler_ring.core.ranks.groups import ProcessGroupLike


def check_ring_size(
    name: str, ring_size: int | None, process_group: ProcessGroupLike | None
) -> int:
    """How many devices the ring has; without a group, how many chunks on this one.

    Raises:
        ValueError: not a positive number, or not the size of the group.
    """
    if ring_size is not None and (not isinstance(ring_size, int) or ring_size < 1):
        raise ValueError(f"{name} must be an int of at least 1 or None, got {ring_size!r}.")
    if process_group is None:
        return ring_size or 1
    size = find_place(group_string(process_group)).world_size
    if ring_size not in (None, size):
        raise ValueError(
            f"{name} must be the size of process_group, {size}, got {ring_size}: each rank holds "
            f"one part of the sequence; leave {name} out, or choose another group."
        )
    return size


def even_shard_lens(tokens: int, process_group: ProcessGroupLike | None) -> list[int]:
    """The `shard_lens` of a sequence cut as evenly as it can be: block i of N holds tokens
    `[i*T//N, (i+1)*T//N)`.

    Args:
        tokens: of the whole sequence.
    """
    ranks = find_place(group_string(process_group)).world_size
    return list(even_lens(tokens, ranks))


def positions_of_shard(
    tokens: int,
    process_group: ProcessGroupLike | None,
    *,
    layout: str = "contiguous",
    shard_lens: Sequence[int] | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Where this rank's tokens stand in the whole sequence: int64 [1, tokens].

    Args:
        tokens: that this rank holds.
        layout: "contiguous" or "zigzag".
        shard_lens: tokens of every block where they differ.
    """
    place = find_place(group_string(process_group))
    lens = list(shard_lens or [tokens] * place.world_size)
    held = LAYOUTS[layout].for_shards(lens).positions(place.block)
    return token_index(held, device).unsqueeze(0)


def sum_gradients(model: nn.Module, process_group: ProcessGroupLike | None) -> None:
    """Add up every parameter's gradient over the ranks that share the sequence; call it after
    `backward`.

    Each rank has the gradient of its own tokens' part of the loss. The sum is the gradient of the
    sum of the ranks' losses, the same bits on every rank. Without a group nothing happens.
    """
    if process_group is None:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    # A rank may have no gradient where another has one; a parameter that none uses keeps None.
    used = [torch.tensor([float(p.grad is not None)]).to(p) for p in parameters]
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([x.flatten() for x in (*parts, *used)])
    dist.all_reduce(flat, group=group_of(group_string(process_group)))
    sums = flat.split([*(p.numel() for p in parameters), len(parameters)])
    for parameter, total, users in zip(parameters, sums, sums[-1].tolist(), strict=False):
        if users:
            parameter.grad = total.view_as(parameter).clone()
