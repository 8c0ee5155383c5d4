"""Tensors on their way through a backend that cannot read their memory.

Gloo sends from a pointer without asking which memory it points to: a CUDA pointer kills the
process. So what goes through gloo on another device is copied to host memory first, and what comes
is copied from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

HOST_BACKENDS = ("gloo",)
"""Backends that read host memory alone in some of the calls that we need."""


class Carriage(Protocol):
    """How tensors get into and out of the hands of a backend."""

    def outgoing(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What to send for them, complete when this returns or in the order of the stream."""
        ...

    def incoming(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What to receive into for them."""
        ...

    def arrived(self, tensors: Sequence[Tensor], received: Sequence[Tensor]) -> None:
        """Fill the tensors from what `incoming` gave for them."""
        ...


class AsItIs:
    """The backend reads and writes the tensors themselves."""

    def outgoing(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors."""
        return list(tensors)

    def incoming(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors."""
        return list(tensors)

    def arrived(self, tensors: Sequence[Tensor], received: Sequence[Tensor]) -> None:
        """Nothing to do."""


class ThroughHost:
    """Copies in host memory, pinned where CUDA reads and writes it.

    Sending waits on the host for the copy, and so for all work queued before it: this is for
    several ranks on one GPU, where NCCL refuses, and for tests. Pinned memory comes from PyTorch's
    caching allocator, which knows the copies that still use it, so it is reused safely.
    """

    def outgoing(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies, complete when this returns."""
        copies = self.incoming(tensors)
        for copy, x in zip(copies, tensors, strict=True):
            copy.copy_(x, non_blocking=True)
        for device in {x.device for x in tensors if x.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return copies

    def incoming(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Host memory of the same sizes."""
        return [
            torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda) for x in tensors
        ]

    def arrived(self, tensors: Sequence[Tensor], received: Sequence[Tensor]) -> None:
        """Copy to the device, in the order of its current stream."""
        for x, copy in zip(tensors, received, strict=True):
            x.copy_(copy, non_blocking=True)


def backends_of(group: dist.ProcessGroup) -> dict[str, str]:
    """The backend of each device type, for example {"cpu": "gloo", "cuda": "nccl"}."""
    pairs = (pair.split(":") for pair in dist.get_backend_config(group).split(","))
    return {device_type: backend for device_type, backend in pairs}


def carriage_of(group: dist.ProcessGroup, device: torch.device) -> Carriage:
    """How the group moves tensors of a device.

    Raises:
        ValueError: it has no backend that could.
    """
    backends = backends_of(group)
    backend = backends.get(device.type)
    if backend is None and "cpu" not in backends:
        raise ValueError(
            f"process_group must have a backend for {device.type} tensors, it has {backends}; pass "
            "tensors on a device that it serves, or initialise it with 'cpu:gloo,cuda:nccl'."
        )
    staged = device.type != "cpu" and (backend is None or backend in HOST_BACKENDS)
    return ThroughHost() if staged else AsItIs()


def device_of_numbers(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """Where a few numbers of the host travel: on the CPU if the group serves it, else `device`."""
    return torch.device("cpu") if "cpu" in backends_of(group) else device
