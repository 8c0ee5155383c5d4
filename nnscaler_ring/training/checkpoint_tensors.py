"""The tensors of a model and its optimizer by name: who writes which part, and who reads it back.

A DTensor (FSDP2, tensor parallelism) is written in the parts that ranks hold, each part once. What
every rank holds alike is written once, by one of them. A tensor that is not a DTensor and differs
from rank to rank (running statistics, say) is written by each. Reading puts together whatever a
rank holds now, from however many ranks have written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnscaler_ring.training.tensor_files import DTYPES, NAMES, TensorFile
from nnscaler_ring.training.tensor_ranks import local_part


class Held(NamedTuple):
    """What this rank holds of one tensor: `local` begins at `start` of the whole's `shape`."""

    local: Tensor
    start: tuple[int, ...]
    shape: tuple[int, ...]
    sharded: bool

    @classmethod
    def of(cls, x: Tensor, name: str) -> Held:
        """Describe a plain tensor or a DTensor.

        Raises:
            TypeError: another kind of tensor, or a DTensor whose sum is still to be taken.
        """
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        if isinstance(x, DTensor):
            if any(placement.is_partial() for placement in x.placements):
                raise TypeError(f"{name} must not be a partial DTensor to be saved; reduce it.")
            local_shape, start = compute_local_shape_and_global_offset(
                x.shape, x.device_mesh, x.placements
            )
            local = x.to_local()
            assert tuple(local.shape) == tuple(local_shape), (name, local.shape, local_shape)
            return cls(local.detach(), tuple(start), tuple(x.shape), True)
        if not isinstance(x, Tensor) or type(x) not in (Tensor, nn.Parameter, nn.Buffer):
            raise TypeError(f"{name} must be a tensor or a DTensor to be saved, got {type(x)}.")
        if x.layout != torch.strided:
            raise TypeError(f"{name} must be dense to be saved, got {x.layout}.")
        return cls(x.detach(), (0,) * x.dim(), tuple(x.shape), False)

    def describe(self) -> dict[str, Any]:
        """Tell what decides who writes."""
        return {
            "dtype": NAMES.get(self.local.dtype, str(self.local.dtype)),
            "shape": list(self.shape),
            "sharded": self.sharded,
            "start": list(self.start),
            "part": list(self.local.shape),
            "print": None if self.sharded else _fingerprint(self.local),
        }


def _fingerprint(x: Tensor) -> int:
    """A sum over the bits: equal for equal tensors, and almost surely no other."""
    flat = x.contiguous().reshape(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    words = flat[:whole].clone().view(torch.int64)
    rest = flat[whole:].to(torch.int64)
    return int(words.sum() + rest.sum())


def plan_writing(descriptions: Sequence[Mapping[str, Any]]) -> tuple[list[set[str]], dict]:
    """Decide who writes what, from what each rank's `Held.describe` say by name.

    Returns:
        The names that each rank writes, and the index of the checkpoint: for each name dtype and
        shape of the whole, and its parts with the rank that wrote them.

    Raises:
        ValueError: ranks hold tensors of one name that do not belong together.
    """
    writes: list[set[str]] = [set() for _ in descriptions]
    index: dict[str, Any] = {}
    for number, name in enumerate(sorted({name for held in descriptions for name in held})):
        holders = [rank for rank, held in enumerate(descriptions) if name in held]
        held = {rank: descriptions[rank][name] for rank in holders}
        first = held[holders[0]]
        for rank, other in held.items():
            for key in ("dtype", "shape", "sharded"):
                if other[key] != first[key]:
                    raise ValueError(
                        f"{name} must have one {key} on every rank, got {first[key]} on rank "
                        f"{holders[0]} and {other[key]} on rank {rank}."
                    )
        by_rank = len({other["print"] for other in held.values()}) > 1
        parts: dict[Any, int] = {}
        for turn in range(len(holders)):
            rank = holders[(turn + number) % len(holders)]  # each writes its share
            place = (*held[rank]["start"], *held[rank]["part"], rank if by_rank else None)
            parts.setdefault(place, rank)
        for rank in parts.values():
            writes[rank].add(name)
        index[name] = {
            "dtype": first["dtype"],
            "shape": first["shape"],
            "sharded": first["sharded"],
            "differs": by_rank,
            "parts": [
                {"rank": rank, "start": held[rank]["start"], "shape": held[rank]["part"]}
                for rank in sorted(parts.values())
            ],
        }
    return writes, index


class SavedTensors:
    """The tensors of one checkpoint, read part by part.

    Args:
        index: of `plan_writing`.
        files: the file of each rank that wrote.
        rank: this one, for tensors that differ from rank to rank.
    """

    def __init__(self, index: Mapping[str, Any], files: Sequence[Path], rank: int) -> None:
        self.index, self._paths, self._rank = index, files, rank
        self._open: dict[int, TensorFile] = {}

    def read(self, name: str, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Read a box of one tensor, on the CPU."""
        entry = self.index[name]
        out = torch.empty(tuple(shape), dtype=DTYPES[entry["dtype"]])
        parts = entry["parts"]
        if entry["differs"]:
            mine = self._rank % len(parts)
            parts = parts[mine : mine + 1]
        covered = 0
        for part in parts:
            lows = [max(a, b) for a, b in zip(start, part["start"], strict=True)]
            highs = [
                min(a + n, b + m)
                for a, n, b, m in zip(start, shape, part["start"], part["shape"], strict=True)
            ]
            if any(low >= high for low, high in zip(lows, highs, strict=True)):
                continue
            here = tuple(slice(a - s, b - s) for a, b, s in zip(lows, highs, start, strict=True))
            there = tuple(
                slice(a - s, b - s) for a, b, s in zip(lows, highs, part["start"], strict=True)
            )
            out[here] = self._file(part["rank"]).read(name)[there]
            covered += math.prod(b - a for a, b in zip(lows, highs, strict=True))
        if covered != out.numel():
            raise ValueError(f"the checkpoint has {covered} of {out.numel()} numbers of {name}.")
        return out

    def read_like(self, name: str, target: Tensor) -> Tensor:
        """Read a tensor as this rank holds `target`: the same shard, on the same device."""
        from torch.distributed.tensor import DTensor

        held = Held.of(target, name)
        local = self.read(name, held.start, held.local.shape).to(local_part(target).device)
        if not isinstance(target, DTensor):
            return local
        return DTensor.from_local(
            local,
            target.device_mesh,
            target.placements,
            run_check=False,
            shape=target.shape,
            stride=target.stride(),
        )

    def read_whole(self, name: str) -> Tensor:
        """Read all of a tensor."""
        shape = self.index[name]["shape"]
        return self.read(name, (0,) * len(shape), shape)

    def _file(self, rank: int) -> TensorFile:
        if rank not in self._open:
            self._open[rank] = TensorFile(self._paths[rank])
        return self._open[rank]
