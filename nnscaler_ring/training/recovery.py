"""Out of memory on one rank: the ranks free what they can and try once more, or all raise.

Note [Why memory is reserved]
    A rank that runs out of memory between two messages leaves the others waiting for it, and no
    rank can go back alone. So the memory that a call will need is reserved and given back before
    anything moves; then the ranks tell each other how it went, in one sum of a number per rank.
    What fails after that raises here at once, and on the others within the group's timeout. No
    rank ever computes alone what was to be shared.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler_ring.core.ranks.groups import ALONE, find_place


def reserve_together(
    group: str, device: torch.device, size: int, free: Callable[[], None], op: str
) -> None:
    """Return if every rank of the group can have `size` bytes; see Note [Why memory is reserved].

    Args:
        free: gives memory back; called on all ranks once, if one of them is short of it.

    Raises:
        torch.OutOfMemoryError: on every rank, if one still has too little; it names the ranks.
        RuntimeError: a rank is lost.
    """
    short = _ranks_short(group, device, size)
    if short:
        free()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        short = _ranks_short(group, device, size)
    if short:
        raise torch.OutOfMemoryError(
            f"{op}: rank(s) {short} cannot have the memory of this call ({size / 1e9:.3f} GB on "
            "this rank), after all ranks freed their caches; use more ranks or a smaller batch."
        )


def try_to_allocate(size: int, device: torch.device) -> bool:
    """Whether so many bytes can be had now."""
    try:
        torch.empty(size, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return False
    except RuntimeError as error:  # the CPU's allocator
        if "can't allocate memory" not in str(error):
            raise
        return False
    return True


def _ranks_short(group: str, device: torch.device, size: int) -> list[int]:
    """The global ranks that cannot have their memory."""
    got = try_to_allocate(size, device)
    place = find_place(group)
    if group == ALONE or place.group is None:
        return [] if got else [0]
    flags = torch.zeros(place.world_size, dtype=torch.int32, device=_flag_device(device))
    flags[place.block] = int(not got)
    dist.all_reduce(flags, group=place.group)
    return [place.global_rank(block) for block in _nonzero(flags)]


def _flag_device(device: torch.device) -> torch.device:
    return device if device.type == "cuda" else torch.device("cpu")


def _nonzero(flags: Tensor) -> list[int]:
    return [block for block, flag in enumerate(flags.tolist()) if flag]
