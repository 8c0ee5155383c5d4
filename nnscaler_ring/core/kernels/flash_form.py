"""The calling form of flash-attention, which torch's CUDA kernel and flash-attn 2, 3 and 4 share.

`FlashKernel` turns tiles into calls of that form once; a library is two functions that pass a call
on. Contract (read in the sources of flash-attn 2.5 to 2.8 and torch 2.13): dense q [b, nq, h, d] or
packed q [rows, h, d] with int32 bounds on the device; one head dim for q, k and v, a multiple of 8;
windows and causal are bottom-right aligned, in every segment.

Note [What flash-attention reads otherwise]
    A row that sees no key has softmax_lse +inf or -inf; here it is -inf, and the backward gets
    +inf, which makes its probabilities 0. The backward checks neither the strides nor the dtype of
    softmax_lse. Memory is read 16 bytes at a time, wherever it starts.

    A window edge that is not below the number of keys counts as unbounded; beside a left edge, an
    unbounded right one counts as the number of keys (of the longest segment). So a right edge above
    0, or a left one alone, is right only where the queries are not more than the keys. Other tiles
    are cut where the first or the last key comes into reach, and tiles without an edge that have
    more queries than keys are not in one call with tiles that have one.

    A packed call's bounds live on the device: they are made from integers, once per schedule, so
    that a step never waits for the device. If no segment is longer than one row, packed q is read
    as one row per segment, which fails where one has none: 2 is said then.

Note [Offsets of 32 bits]
    The backward of flash-attention 2 counts `(rows of a segment + 128 * segments) * heads *
    head_dim` in 32 bits and writes elsewhere beyond that (head_dim a multiple of 64, at most). So
    longer tiles are cut, and tiles go together in a call that take up half of it at most; each may
    come with two more segments, of rows and of keys that see nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nnscaler_ring.core.kernels.contract import BackwardTensors, Problem, TileGradients
from nnscaler_ring.core.kernels.cuts import banded_tile
from nnscaler_ring.core.kernels.head_dims import (
    aligned,
    lse_columns,
    round_up,
    to_head_dim,
    with_lse_columns,
)
from nnscaler_ring.core.kernels.score_blocks import blocks_backward
from nnscaler_ring.core.plan.tile import KernelCall, Segments, Tile, batched, trim
from nnscaler_ring.core.scores.scores import TileScores

HEAD_DIMS = range(8, 257, 8)
"""Of q, k and v, that a library of the form computes if nothing else is known of it."""

MOST_TILES = 1 << 12
"""Of one call: a CUDA grid has at most 65,535 segments."""


class Packed(NamedTuple):
    """The segments of a packed call: bounds on the device, lengths of the longest."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass(frozen=True)
class FlashCall:
    """What a call says beside its tensors; -1 is unbounded; causal stands for left -1, right 0."""

    softmax_scale: float
    causal: bool
    left: int
    right: int
    softcap: float
    deterministic: bool
    packed: Packed | None


class FlashLibrary(Protocol):
    """An implementation of the form."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: FlashCall) -> tuple[Tensor, Tensor]:
        """(out, softmax_lse [b, h, nq] or packed [h, rows])."""
        ...

    def backward(self, tensors: BackwardTensors, call: FlashCall) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv), fresh, of the softmax that `softmax_lse` normalises."""
        ...


@dataclass(frozen=True)
class FlashKernel:
    """An `AttentionKernel` over a library of the form, for one kind of problem.

    All tiles of a step that share a window are one call. A softcap is the library's; what else
    changes the scores does not come here. `head_dims`: what the library computes, ascending; others
    are padded with zeros to the next.
    """

    name: str
    library: FlashLibrary
    problem: Problem
    head_dims: Sequence[int] = HEAD_DIMS

    def calls(self, tiles: Sequence[Tile], *, plain: bool) -> Sequence[KernelCall]:
        """One call, or a few, for all tiles: Note [Tiles in one call] in tile.py."""
        head_dim = max(self.problem.head_dim, self.problem.v_head_dim)
        return _calls(tuple(tiles), self.problem.num_heads * round_up(head_dim, 64))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: TileScores) -> tuple[Tensor, Tensor]:
        """One call of the library."""
        batch, v_head_dim = q.shape[0], v.shape[-1]
        call = self._call(scores, batch, q.device)
        head_dim = self._next_head_dim(q.shape[-1], v_head_dim)
        q, k, v = (_packed(aligned(x), call) for x in to_head_dim(head_dim, q, k, v))
        out, softmax_lse = self.library.forward(q, k, v, call)
        if call.packed is not None:
            out = out.unflatten(0, (batch, -1))
            softmax_lse = softmax_lse.unflatten(1, (batch, -1)).transpose(0, 1)
            # Note [What flash-attention reads otherwise]; in a tile every row sees a key.
            softmax_lse = softmax_lse.masked_fill(softmax_lse == torch.inf, -torch.inf)
        return out[..., :v_head_dim], softmax_lse

    def backward(self, tensors: BackwardTensors, scores: TileScores) -> TileGradients:
        """One call of the library; a gradient of the lse takes columns beside v's channels."""
        dout, dlse, q, k, v, out, softmax_lse = tensors
        batch, dims = q.shape[0], (q.shape[-1], k.shape[-1], v.shape[-1])
        if dlse is not None:
            if max(dims[0], dims[2] + lse_columns(q.dtype)) > self.head_dims[-1]:
                tiles = _tiles_of(q.shape[1], k.shape[1], scores.window, scores.segments)
                return blocks_backward(tensors, tiles, scores)
            dout, v, out = with_lse_columns(dout, v, out, dlse)
        call = self._call(scores, batch, q.device)
        head_dim = self._next_head_dim(q.shape[-1], v.shape[-1])
        padded = to_head_dim(head_dim, dout, q, k, v, out)
        dout, q, k, v, out = (_packed(aligned(x), call) for x in padded)
        if call.packed is not None:
            # Note [What flash-attention reads otherwise]; in a tile every row sees a key.
            softmax_lse = softmax_lse.masked_fill(softmax_lse == -torch.inf, torch.inf)
            softmax_lse = softmax_lse.transpose(0, 1).flatten(1)
        given = BackwardTensors(dout, None, q, k, v, out, softmax_lse.contiguous())
        gradients = self.library.backward(given, call)
        if call.packed is not None:
            gradients = tuple(x.unflatten(0, (batch, -1)) for x in gradients)
        return TileGradients(*(x[..., :dim] for x, dim in zip(gradients, dims, strict=True)))

    def _next_head_dim(self, *head_dims: int) -> int:
        return next(dim for dim in self.head_dims if dim >= max(head_dims))

    def _call(self, scores: TileScores, batch: int, device: torch.device) -> FlashCall:
        causal = scores.window == (-1, 0)
        left, right = (-1, -1) if causal else scores.window
        return FlashCall(
            scores.softmax_scale,
            causal,
            left,
            right,
            0.0 if scores.mods is None else scores.mods.softcap,
            self.problem.deterministic,
            None if scores.segments is None else _on_device(scores.segments, batch, device),
        )


@lru_cache(maxsize=1024)
def _calls(tiles: tuple[Tile, ...], row_size: int) -> tuple[KernelCall, ...]:
    """The tiles as few calls, where a row has so many elements: Note [Offsets of 32 bits]."""
    rows = max(1, (2**31 - 1) // row_size)
    pieces = [
        piece for tile in tiles for short in _of_rows(tile, rows) for piece in _within_reach(short)
    ]
    groups: dict[bool, list[Tile]] = {False: [], True: []}
    alone = []
    for piece in pieces:
        if piece.q1 - piece.q0 > rows // 2:
            alone.append(piece)
        else:
            groups[_is_tall(piece)].append(piece)
    most = min(MOST_TILES, max(1, rows // 2 // (3 * 128)))
    return *alone, *(call for some in groups.values() for call in batched(tuple(some), most))


def _is_tall(tile: Tile) -> bool:
    """Without an edge, and of more rows than keys."""
    return tile.window() == (-1, -1) and tile.q1 - tile.q0 > tile.k1 - tile.k0


def _of_rows(tile: Tile, rows: int) -> Iterator[Tile]:
    """The tile as tiles of at most so many query rows."""
    for start in range(tile.q0, tile.q1, rows):
        if piece := trim(tile._replace(q0=start, q1=min(start + rows, tile.q1))):
            yield piece


def _within_reach(tile: Tile) -> Iterator[Tile]:
    """The tile as tiles whose window the library reads as it is."""
    # Note [What flash-attention reads otherwise].
    left, right = tile.window()
    keys = tile.k1 - tile.k0
    if right >= keys:
        cut = tile.k1 - tile.hi  # the first row that sees up to the last key and would see more
    elif right < 0 <= left and tile.q1 - tile.q0 > keys:
        cut = tile.k0 - tile.lo + 1  # the first row that does not see the first key
    else:
        yield tile
        return
    for part in (tile._replace(q1=cut), tile._replace(q0=cut)):
        if piece := trim(part):
            yield from _within_reach(piece)


@lru_cache(maxsize=256)
def _on_device(segments: Segments, batch: int, device: torch.device) -> Packed:
    """The segments of every row of the batch, one after another."""
    (cu_seqlens_q, max_q), (cu_seqlens_k, max_k) = (
        (_copied(_cu_seqlens(bounds, batch), device), max(b - a for a, b in pairwise(bounds)))
        for bounds in segments
    )
    # Note [What flash-attention reads otherwise].
    return Packed(cu_seqlens_q, cu_seqlens_k, max(2, max_q), max_k)


def _cu_seqlens(bounds: tuple[int, ...], batch: int) -> list[int]:
    starts = [n * bounds[-1] + start for n in range(batch) for start in bounds[:-1]]
    return [*starts, batch * bounds[-1]]


def _copied(integers: list[int], device: torch.device) -> Tensor:
    """On the device, complete when this returns: any stream may read them.

    The host waits for this copy alone. A copy from pageable memory would wait for all that is
    queued, in every step with new documents.
    """
    if device.type != "cuda":
        return torch.tensor(integers, dtype=torch.int32, device=device)
    host = torch.tensor(integers, dtype=torch.int32, pin_memory=True)
    stream = _copy_stream(device)
    with torch.cuda.stream(stream):
        copied = host.to(device, non_blocking=True)
    stream.synchronize()
    copied.record_stream(torch.cuda.current_stream(device))
    return copied


@lru_cache(maxsize=64)
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _packed(x: Tensor, call: FlashCall) -> Tensor:
    return x if call.packed is None else x.flatten(0, 1)


def _tiles_of(
    nq: int, nk: int, window: tuple[int, int], segments: Segments | None
) -> Iterator[Tile]:
    """The tiles of a call, counted from its first row and key."""
    if segments is None:
        segments = Segments((0, nq), (0, nk))
    for (q0, q1), (k0, k1) in zip(*map(pairwise, segments), strict=True):
        _, rows, _, keys, lo, hi = banded_tile(q1 - q0, k1 - k0, window)
        moved = Tile(q0, q0 + rows, k0, k0 + keys, lo + k0 - q0, hi + k0 - q0)
        if tile := trim(moved):
            yield tile
