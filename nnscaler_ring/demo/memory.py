"""Peak memory of a process, and of one attention layer on each rank.

Note [Resident memory]
    Linux resets a process's peak of resident memory when 5 is written to /proc/self/clear_refs, so
    the peak of a passage above the level before it can be read: everything counts, messages and
    buffers too. Freed memory must go back to the system for that, so malloc is told to give back
    what it holds, and to map blocks from 128 KiB on by themselves; only there, since it costs a
    third of a training step's time. (The threshold alone is not enough: malloc looks among its free
    blocks first, and what it reuses was resident before.)
    Elsewhere torch's profiler counts the bytes of tensors.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nnscaler_ring.core.kernels import Problem
from nnscaler_ring.demo.shard import Split
from nnscaler_ring.launch import Rank
from nnscaler_ring.machine import usable_kernel

# Of glibc's malloc.h, with the values that it settles on by itself.
M_TRIM_THRESHOLD, USUAL_TRIM_THRESHOLD = -1, 64 * 2**20
M_MMAP_THRESHOLD, USUAL_MMAP_THRESHOLD = -3, 32 * 2**20
CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass
class PeakMemory:
    """The peak of a passage above the level before it, in bytes, and how it was measured."""

    bytes: int = 0
    method: str = ""


@contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Measures the passage inside. See Note [Resident memory]."""
    peak = PeakMemory()
    gc.collect()
    if device.type == "cuda":
        peak.method = "bytes of torch's CUDA allocator"
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
    elif _reset_resident_peak():
        peak.method = "resident memory of the process"
        before = _status("VmRSS")
        yield peak
        peak.bytes = _status("VmHWM") - before
        _mallopt(M_MMAP_THRESHOLD, USUAL_MMAP_THRESHOLD)
        _mallopt(M_TRIM_THRESHOLD, USUAL_TRIM_THRESHOLD)
    else:
        peak.method = "bytes of tensors, as torch's profiler counts them"
        with torch.profiler.profile(profile_memory=True) as profile:
            yield peak
        peak.bytes = _peak_of_tensors(profile)


def count_tensor_bytes(run: Callable[[], object]) -> int:
    """The largest sum of live tensor bytes that a run makes on the CPU, whatever malloc does."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
        gc.collect()
    return _peak_of_tensors(profile)


def _reset_resident_peak() -> bool:
    try:
        _mallopt(M_MMAP_THRESHOLD, 128 * 1024)
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR_REFS.write_text("5")
    except (OSError, AttributeError):  # not glibc, or a system that does not let us
        return False
    return True


def _mallopt(parameter: int, value: int) -> None:
    ctypes.CDLL(None).mallopt(parameter, value)


def _status(name: str) -> int:
    """A line of /proc/self/status, which are in KiB, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def _peak_of_tensors(profile: torch.profiler.profile) -> int:
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events: list[Any] = profile.profiler.kineto_results.events()  # torch types lack nbytes
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    level = highest = 0
    for _, change in changes:
        level += change
        highest = max(highest, level)
    return highest


@dataclass(frozen=True)
class AttentionSize:
    """One causal attention layer over a whole sequence, in float32."""

    tokens: int = 16384
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64


def attention_memory(rank: Rank, split: Split, size: AttentionSize) -> PeakMemory:
    """Peak memory of this rank's share of one layer: q, k, v, out, all gradients, all messages."""
    # A short sequence loads what the first call loads.
    _attend(rank, replace(split, tokens=64 * rank.world_size), size)
    with peak_memory(rank.device) as peak:
        _attend(rank, split, size)
    return peak


def _attend(rank: Rank, split: Split, size: AttentionSize) -> None:
    heads = size.num_heads, size.num_kv_heads, size.head_dim, size.head_dim
    kernel = usable_kernel(Problem(rank.device.type, torch.float32, *heads))
    held = split.rows(rank.rank).shape
    q, k, v = (
        torch.randn(*held, h, size.head_dim, device=rank.device, requires_grad=True)
        for h in (size.num_heads, size.num_kv_heads, size.num_kv_heads)
    )
    out = split.attention(kernel)(q, k, v, torch.tensor([0, split.tokens]))
    out.backward(torch.randn_like(out))
