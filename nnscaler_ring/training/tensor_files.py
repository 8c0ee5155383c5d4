"""Files of tensors in the safetensors format, written and read without pickle.

The format is a length (8 bytes, little-endian), a JSON header of that length, and the numbers of
all tensors one after the other. Other programs read it, too.

Source: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors to a new file, down to the disk; returns the file's sha256.

    Raises:
        TypeError: a dtype that the format has no name for.
        OSError: the disk is full, or the like.
    """
    # The widest numbers first, so that all of them lie at multiples of their size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        x = tensors[name]
        if x.dtype not in NAMES:
            raise TypeError(f"{name} must have one of the dtypes {(*NAMES,)}, got {x.dtype}.")
        start, end = end, end + x.numel() * x.element_size()
        header[name] = {
            "dtype": NAMES[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for piece in (len(text).to_bytes(8, "little"), text):
            digest.update(piece)
            file.write(piece)
        for name in names:
            numbers = bytes_of(tensors[name])
            digest.update(numbers)
            file.write(numbers)
        _to_disk(file)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> str:
    """Write a text to a new file, down to the disk; returns the file's sha256."""
    data = text.encode()
    with path.open("xb") as file:
        file.write(data)
        _to_disk(file)
    return hashlib.sha256(data).hexdigest()


class TensorFile:
    """A file that `write_tensors` has written; tensors share the file's memory until copied."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self._header = json.loads(file.read(length))
        self._start = 8 + length
        size = path.stat().st_size
        self._all = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        entry = self._header[name]
        start, stop = (self._start + offset for offset in entry["data_offsets"])
        return self._all[start:stop].view(DTYPES[entry["dtype"]]).view(entry["shape"])


def file_digest(path: Path) -> str:
    """Compute the sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def folder_to_disk(folder: Path) -> None:
    """Let the names in a folder reach the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def bytes_of(x: Tensor) -> memoryview:
    """View the numbers of a tensor, on the CPU and one after the other."""
    flat = x.detach().cpu().contiguous().reshape(-1)
    size = flat.numel() * flat.element_size()
    if not size:
        return memoryview(b"")
    memory: Any = (ctypes.c_ubyte * size).from_address(flat.data_ptr())
    memory.tensor = flat  # the view keeps the array alive, and the array the tensor
    return memoryview(memory).cast("B")
