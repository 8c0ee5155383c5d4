"""`ring_size` of models and modules: the size of their group, or without one a number of chunks."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch.distributed as dist

from nnscaler_ring.core.ranks.groups import find_place, group_string

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
        if ring_size is not None:
            _warn_if_ranks_are_meant(name, ring_size)
        return ring_size or 1
    size = find_place(group_string(process_group)).world_size
    if ring_size not in (None, size):
        raise ValueError(
            f"{name} must be the size of process_group, {size}, got {ring_size}: each rank holds "
            f"one part of the sequence; leave {name} out, or choose another group."
        )
    return size


def _warn_if_ranks_are_meant(name: str, ring_size: int) -> None:
    """Chunks on one device are as many as there are ranks: probably the ranks were meant."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ring_size == ranks > 1:
        warnings.warn(
            f"{name}={ring_size} without process_group cuts the sequence into chunks on this "
            f"device alone: each of the {ranks} ranks attends to its own tokens only. If the ranks "
            "share a sequence, pass process_group=torch.distributed.group.WORLD; if they do not, "
            f"leave {name} out.",
            stacklevel=4,
        )
