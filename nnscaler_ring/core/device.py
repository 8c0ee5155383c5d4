"""The device that a module computes on: its name and its memory, as they are now."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from typing import Any

import torch


def device_name(device: str) -> str:
    """One line for reports."""
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores, {platform.system()}"


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
