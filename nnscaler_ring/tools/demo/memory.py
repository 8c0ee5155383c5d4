"""Peak memory of a process, and of one attention layer on each rank.

Note [Resident memory]
    Linux resets a process's peak of resident memory when 5 is written to /proc/self/clear_refs, so
    the peak of a passage above the level before it can be read: everything counts, messages and
    buffers too. Freed memory must go back to the system for that, so malloc is told to give back
    what it holds, and to map blocks from 128 KiB on by themselves; only there, since it costs a
    third of a training step's time. (The threshold alone is not enough: malloc looks among its free
    blocks first, and what it reuses was resident before.)
    Elsewhere torch's profiler counts the bytes of tensors.

Note [Counted bytes]
    Counted is every tensor that this thread makes, however deep inside an op, with the bytes asked
    for: the events of PyTorch's CPU allocator, replayed, whatever malloc does. A deallocation is
    missed where another thread drops the last reference, as gloo's threads may after a collective:
    what was missed is left over, and the peak is at most that much too high. (simulator.LiveBytes
    tells apart what tensors are for, and does not see inside an op.)
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nnscaler_ring.core.kernels import Problem
from nnscaler_ring.tools.demo.shard import Split
from nnscaler_ring.tools.launch import Rank
from nnscaler_ring.tools.machine import usable_kernel

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
    elif _map_large_blocks() and reset_resident_peak():
        peak.method = "resident memory of the process"
        before = status_bytes("VmRSS")
        yield peak
        peak.bytes = status_bytes("VmHWM") - before
        _mallopt(M_MMAP_THRESHOLD, USUAL_MMAP_THRESHOLD)
        _mallopt(M_TRIM_THRESHOLD, USUAL_TRIM_THRESHOLD)
    else:
        peak.method = "bytes of tensors, as torch's profiler counts them"
        with _profiled() as profile:
            yield peak
        peak.bytes = _replayed(profile).peak


class TensorBytes(NamedTuple):
    """Counted bytes of tensors on the CPU: see Note [Counted bytes]."""

    peak: int
    left_over: int


def count_tensor_bytes(run: Callable[[], object]) -> TensorBytes:
    """Of the tensors that a run makes; those that were there before do not count."""
    gc.collect()
    with _profiled() as profile:
        run()
        gc.collect()
    return _replayed(profile)


def reset_resident_peak() -> bool:
    """Let VmHWM start anew, with free memory given back; False on systems that cannot."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR_REFS.write_text("5")
    except (OSError, AttributeError):  # not glibc, or a system that does not let us
        return False
    return True


def _map_large_blocks() -> bool:
    try:
        _mallopt(M_MMAP_THRESHOLD, 128 * 1024)
    except AttributeError:  # not glibc
        return False
    return True


def _mallopt(parameter: int, value: int) -> None:
    ctypes.CDLL(None).mallopt(parameter, value)


def status_bytes(name: str) -> int:
    """A line of /proc/self/status, which are in KiB, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def _profiled() -> torch.profiler.profile:
    cpu = torch.profiler.ProfilerActivity.CPU
    return torch.profiler.profile(activities=[cpu], profile_memory=True)


def _replayed(profile: torch.profiler.profile) -> TensorBytes:
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events: list[Any] = profile.profiler.kineto_results.events()  # torch types lack nbytes
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    level = highest = 0
    for _, change in changes:
        level += change
        highest = max(highest, level)
    return TensorBytes(highest, level)


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
