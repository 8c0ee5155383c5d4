"""cu_seqlens as a value: read from the tensor at most once, cheap to hash and to compare."""

from __future__ import annotations

from array import array

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Documents = bytes
"""The int64 values of a cu_seqlens, as bytes."""

# Copies of tensors that live on a device, so that a model's layers share one copy per new tensor.
_COPIED = WeakTensorKeyDictionary()


def documents_of(cu_seqlens: Tensor) -> Documents:
    """The values; waits for the device at most once per tensor and version, never for the CPU."""
    if cu_seqlens.device.type == "cpu" or cu_seqlens.is_inference():
        return array("q", cu_seqlens.tolist()).tobytes()
    version, documents = _COPIED.get(cu_seqlens, (None, b""))
    if version != cu_seqlens._version:
        documents = array("q", cu_seqlens.tolist()).tobytes()
        _COPIED[cu_seqlens] = cu_seqlens._version, documents
    return documents


def cu_seqlens_of(documents: Documents) -> tuple[int, ...]:
    """The values as ints."""
    return tuple(array("q", documents))


def total_of(documents: Documents) -> int:
    """The last value: the tokens of all documents."""
    return array("q", documents[-8:])[0]
