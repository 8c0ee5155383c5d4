"""Peak memory of a passage, by both ways of measuring it."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from nnscaler_ring.tools.demo import memory
from nnscaler_ring.tools.demo.memory import CLEAR_REFS, PeakMemory, peak_memory

MIB = 2**20


def allocate() -> None:
    kept = torch.ones(24 * MIB // 4)
    del kept
    first, second = torch.ones(16 * MIB // 4), torch.ones(16 * MIB // 4)
    del first, second


def peak_with_free_blocks_in_the_heap() -> PeakMemory:
    """What a long session leaves: free memory in malloc's hands, below blocks still in use."""
    memory._mallopt(memory.M_MMAP_THRESHOLD, memory.USUAL_MMAP_THRESHOLD)
    freed, kept = [], []
    for _ in range(8):
        freed.append(torch.ones(28 * MIB // 4))
        kept.append(torch.ones(1024))
    freed.clear()
    with peak_memory(torch.device("cpu")) as peak:
        allocate()
    return peak


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="needs Linux")
def test_resident_memory():
    # In a process of its own: other tests leave other heaps.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        peak = process.submit(peak_with_free_blocks_in_the_heap).result()
    assert peak.method == "resident memory of the process"
    assert 31 * MIB < peak.bytes < 48 * MIB


def test_bytes_of_tensors(monkeypatch):
    monkeypatch.setattr(memory, "reset_resident_peak", lambda: False)
    with peak_memory(torch.device("cpu")) as peak:
        allocate()
    assert peak.method.startswith("bytes of tensors")
    assert 32 * MIB <= peak.bytes < 33 * MIB
