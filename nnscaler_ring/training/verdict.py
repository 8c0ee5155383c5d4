"""All ranks do something together, and all of them learn whether one of them failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def rank_and_size() -> tuple[int, int]:
    """Tell this process's rank and the number of ranks; (0, 1) where no group was initialised."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value: T) -> list[T]:
    """Bring the value of every rank to every rank."""
    if not dist.is_initialized():
        return [value]
    found = [value] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def together(what: str, action: Callable[[], T]) -> T:
    """Call `action` on every rank; return its result only if no rank raised.

    Args:
        what: is being done, for the message of ranks whose own part went well.

    Raises:
        Exception: this rank's own.
        RuntimeError: another rank's, with its number and its words.
    """
    error: Exception | None = None
    try:
        result = action()
    except Exception as caught:
        error = caught
    texts = gather(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, text in enumerate(texts):
        if text is not None:
            raise RuntimeError(f"{what} failed on rank {rank}: {text}")
    return result
