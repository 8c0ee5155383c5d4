"""What this machine offers: versions, devices, and which kernels can compute what on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nnscaler_ring.core.device import device_name
from nnscaler_ring.core.kernels import Problem, auto_kernels, kernel_refusals, select_kernel

PACKAGES = ("nnscaler", "flash-attn", "flash-attn-4", "transformer-engine", "triton")
"""What changes results or speed beside torch; looked up, never imported: that may take seconds or
fail."""


def package_versions() -> dict[str, str | None]:
    """Version of each package; None where it is not installed."""
    # Metadata have torch's build, such as +cu130, for some of its wheels only.
    known = {"python": platform.python_version(), "torch": torch.__version__}
    return known | {name: _version(name) for name in PACKAGES}


def cuda_versions() -> dict[str, str | None]:
    """Of what stands below torch on a GPU; None for what this torch or this machine has not."""
    cudnn = torch.backends.cudnn.version()
    nccl = torch.cuda.nccl.version() if dist.is_available() and dist.is_nccl_available() else None
    return {
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
        "nccl": None if nccl is None else ".".join(map(str, nccl)),
        "driver": _driver_version(),
    }


def _driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> dict[str, Any]:
    """Processors, threads, GPUs and the backends that ranks can talk over."""
    available = dist.is_available()
    return {
        "platform": platform.platform(),
        "cpu": platform.machine(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
        "backends": [
            name for name in ("gloo", "nccl") if available and dist.is_backend_available(name)
        ],
    }


def source_commit() -> dict[str, Any]:
    """The git commit of a source checkout, and whether it has changes; None where there is none."""
    here = Path(__file__).resolve()
    tracked = git_output(here.parent, "ls-files", "--error-unmatch", here.name)
    if tracked is None:
        return {"commit": None, "dirty": None}
    # New result files do not change what is measured.
    changes = git_output(
        here.parents[1], "status", "--porcelain", "--", ".", ":!benchmarks/results"
    )
    return {"commit": git_output(here.parent, "rev-parse", "HEAD"), "dirty": bool(changes)}


def git_output(folder: Path, *arguments: str) -> str | None:
    """What git prints in a folder; None where there is no git, no repository, or it fails."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def origin(command: Sequence[str], device: str) -> dict[str, Any]:
    """What a report's figures are from: command, date, device, versions, commit."""
    return {
        "command": shlex.join(command),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "versions": package_versions(),
        **source_commit(),
    }


def device_types() -> list[str]:
    """The device types that this machine has."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def check_device(device: str) -> None:
    """Raises ValueError for a device type that this machine has not."""
    if device not in device_types():
        raise ValueError(f"device must be one of {device_types()} on this machine, got {device}.")


def typical_problems() -> list[Problem]:
    """Calls as current models make them, with 32 heads on 8 KV heads, on each device type."""
    return [
        _problem(device_type, dtype, head_dim)
        for device_type in device_types()
        for dtype in (torch.float32, torch.bfloat16)
        for head_dim in (64, 128)
    ]


def _problem(device_type: str, dtype: torch.dtype, head_dim: int) -> Problem:
    return Problem(
        device_type, dtype, num_heads=32, num_kv_heads=8, head_dim=head_dim, v_head_dim=head_dim
    )


def kernel_table() -> list[dict[str, Any]]:
    """For each typical problem: the kernels' refusals, and what kernel="auto" asks and takes."""
    return [
        {
            "device": problem.device_type,
            "dtype": str(problem.dtype).removeprefix("torch."),
            "head_dim": problem.head_dim,
            "refusals": kernel_refusals(problem),
            "asked": auto_kernels(problem),
            "auto": auto_kernel(problem),
        }
        for problem in typical_problems()
    ]


def auto_kernel(problem: Problem) -> str | None:
    """The kernel that kernel="auto" takes, None where it finds none."""
    try:
        return select_kernel("auto", problem).name
    except ValueError:
        return None


def usable_kernel(problem: Problem) -> str:
    """What kernel="auto" takes, else "reference", which computes anything slowly."""
    return auto_kernel(problem) or "reference"
