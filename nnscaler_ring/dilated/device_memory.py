"""Memory of the device that a module computes on, measured."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import torch


def free_bytes(device: torch.device) -> int:
    """What can be had now: of the GPU with torch's unused reserve, or of the machine."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def device_figures(device: torch.device) -> dict[str, Any]:
    """Free bytes; of a GPU also what torch holds, and its utilisation where pynvml can be read."""
    figures: dict[str, Any] = {"device": str(device), "free_bytes": free_bytes(device)}
    if device.type == "cuda":
        figures["allocated_bytes"] = torch.cuda.memory_allocated(device)
        figures["reserved_bytes"] = torch.cuda.memory_reserved(device)
        with suppress(ModuleNotFoundError):  # pynvml
            figures["gpu_utilization_percent"] = torch.cuda.utilization(device)
    return figures
