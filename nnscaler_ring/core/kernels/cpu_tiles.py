"""The package's own CPU kernel: C++ in native/, called through ctypes, on strided views.

Every tile is one call, whatever its band, head dims or strides; what happens to scores happens
inside. The library is compiled in advance, never by a call: native/library.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from nnscaler_ring.core.kernels.contract import (
    AttentionKernel,
    BackwardTensors,
    Problem,
    TileGradients,
)
from nnscaler_ring.core.kernels.cuts import banded_tile, score_blocks
from nnscaler_ring.core.kernels.native.library import Library, library
from nnscaler_ring.core.plan.tile import KernelCall, Tile
from nnscaler_ring.core.scores.scores import ScoreMods, TileScores

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""In the order of `Dtype` in native/tensors.h."""

BIAS_BLOCK = (2048, 8192)
"""Rows and keys of a call with score options: a bias and its gradient are built at a time."""

POISONED = False
"""Tests set it: what the kernel reads before it writes is then NaN."""


class CpuTiles:
    """Memory O(rows), also with score options; the same bits for the same number of threads."""

    name = "cpu_tiles"

    def limits(self, problem: Problem) -> str | None:
        """CPU tensors of 16 or 32 bits."""
        if problem.device_type != "cpu":
            return f"it computes on cpu, the tensors are on {problem.device_type}"
        if problem.dtype not in DTYPES:
            return f"it computes in {', '.join(map(str, DTYPES))}, not in {problem.dtype}"
        return None

    def supports(self, problem: Problem) -> str | None:
        """The same, where the library is there."""
        if reason := self.limits(problem):
            return reason
        found = library()
        return found if isinstance(found, str) else None

    def prepared(self, problem: Problem) -> AttentionKernel:
        """The same for every call."""
        found = library()
        assert isinstance(found, Library), found  # `supports` was asked
        return PreparedCpuTiles(found)


def torch_is_faster(problem: Problem) -> bool:
    """Whether torch's fused kernel beats this one on the machine: benchmarks/README.md, cpu_tiles.

    Only without score options. On the baseline instruction set (with AVX2 at the latest, ours is
    the faster), and for bfloat16 where there is AMX, which torch's kernel uses and ours does not;
    AMX and processors other than x86-64 have not been measured.
    """
    if problem.softcap or problem.alibi or problem.bias or problem.dropout:
        return False
    found = library()
    if isinstance(found, Library) and found.instruction_set == "baseline":
        return True
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", None)  # private: it may go
    return problem.dtype == torch.bfloat16 and has_amx is not None and bool(has_amx())


class PreparedCpuTiles:
    """The kernel with its library."""

    name = CpuTiles.name

    def __init__(self, found: Library) -> None:
        self._attention = found.functions.nnscaler_ring_attention

    def calls(self, tiles: Sequence[Tile], *, plain: bool) -> Sequence[KernelCall]:
        """Any band is one call."""
        if plain:
            return tiles
        return [block for tile in tiles for block in score_blocks(tile, *BIAS_BLOCK)]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: TileScores) -> tuple[Tensor, Tensor]:
        """Out in q's dtype, softmax_lse in float32."""
        batch, nq, num_heads, _ = q.shape
        out = q.new_empty(batch, nq, num_heads, v.shape[-1])
        # Rows before heads in memory, as in PartialOutput.
        lse = q.new_empty(batch, nq, num_heads, dtype=torch.float32)
        self._run(_call(q, k, v, scores), q, out=out, lse=lse.unsqueeze(-1))
        return out, lse.transpose(1, 2)

    def backward(self, tensors: BackwardTensors, scores: TileScores) -> TileGradients:
        """In the dtypes of q, k and v; sums of a tile are in float32."""
        dout, dlse, q, k, v, out, softmax_lse = tensors
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        dbias = None
        if scores.mods is not None and scores.mods.needs_dbias:
            # Hidden keys are not written.
            dbias = torch.zeros(*softmax_lse.shape, k.shape[1], dtype=torch.float32)
        self._run(
            _call(q, k, v, scores),
            q,
            is_backward=True,
            out=out.to(q.dtype),
            dout=dout.to(q.dtype),
            lse=_rows_first(softmax_lse),
            dlse=None if dlse is None else _rows_first(dlse),
            dq=dq,
            dk=dk,
            dv=dv,
            dbias=None if dbias is None else dbias.transpose(1, 2),
        )
        return TileGradients(dq, dk, dv, dbias)

    def _run(
        self, call: _Call, q: Tensor, *, is_backward: bool = False, **tensors: Tensor | None
    ) -> None:
        for name, tensor in tensors.items():
            if tensor is not None:
                setattr(call, name, _strided(tensor))
        call.keep_alive.append(tensors)
        failed = self._attention(ctypes.byref(call), is_backward, torch.get_num_threads())
        if failed:
            raise MemoryError(f"{self.name} found no memory for a tile of q {tuple(q.shape)}")


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 4)]


class _Call(ctypes.Structure):
    """`Call` in native/call.h."""

    _fields_ = [
        ("poisoned", ctypes.c_int64),
        *((n, ctypes.c_int64) for n in ("dtype", "bias_dtype", "batch", "num_heads")),
        *((n, ctypes.c_int64) for n in ("num_kv_heads", "nq", "nk", "head_dim", "v_head_dim")),
        *((n, _Tensor) for n in ("q", "k", "v", "out", "lse", "dout", "dlse", "dq", "dk", "dv")),
        *((n, _Tensor) for n in ("bias", "dbias")),
        *((n, ctypes.c_double) for n in ("softmax_scale", "softcap")),
        *((n, ctypes.c_int64) for n in ("lo", "hi")),
        *((n, ctypes.c_void_p) for n in ("alibi_slopes", "q_positions", "k_positions")),
        *((n, ctypes.c_void_p) for n in ("q_tokens", "k_tokens")),
        *((n, ctypes.c_int64) for n in ("seed", "dropped_below", "first_batch", "first_head")),
        ("kept_factor", ctypes.c_double),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.keep_alive: list[object] = []


def _call(q: Tensor, k: Tensor, v: Tensor, scores: TileScores) -> _Call:
    call = _Call()
    call.poisoned = POISONED
    call.dtype = DTYPES.index(q.dtype)
    call.batch, call.nq, call.num_heads, call.head_dim = q.shape
    call.nk, call.num_kv_heads, call.v_head_dim = v.shape[1:]
    call.q, call.k, call.v = _strided(q), _strided(k), _strided(v)
    call.softmax_scale = scores.softmax_scale
    *_, call.lo, call.hi = banded_tile(call.nq, call.nk, scores.window)
    if scores.mods is not None:
        _take_mods(call, scores.mods)
    return call


def _take_mods(call: _Call, mods: ScoreMods) -> None:
    def address(x: Tensor, dtype: torch.dtype) -> int:
        x = x.to(dtype).contiguous()
        call.keep_alive.append(x)
        return x.data_ptr()

    shape = (call.batch, call.num_heads)
    call.softcap = mods.softcap
    if mods.bias is not None:
        bias = mods.bias if mods.bias.dtype in DTYPES else mods.bias.to(torch.float32)
        call.keep_alive.append(bias)
        call.bias_dtype = DTYPES.index(bias.dtype)
        call.bias = _strided(bias.expand(*shape, call.nq, call.nk).transpose(1, 2))
    if mods.alibi_slopes is not None:
        # Distances are exact in float32: positions count from the tile's first key.
        first = mods.k.positions[0]
        call.alibi_slopes = address(mods.alibi_slopes.expand(shape), torch.float32)
        call.q_positions = address(mods.q.positions - first, torch.float32)
        call.k_positions = address(mods.k.positions - first, torch.float32)
    if mods.dropout is not None:
        call.q_tokens = address(mods.q.tokens, torch.int64)
        call.k_tokens = address(mods.k.tokens, torch.int64)
        call.seed = int(mods.dropout.seed)
        call.first_batch, call.first_head = mods.dropout.first_batch, mods.dropout.first_head
        call.dropped_below = int(mods.dropout.probability * 2**53)
        call.kept_factor = 1 / (1 - mods.dropout.probability)


def _strided(x: Tensor) -> _Tensor:
    return _Tensor(x.data_ptr(), (ctypes.c_int64 * 4)(*x.stride()))


def _rows_first(lse: Tensor) -> Tensor:
    """[b, h, nq] as [b, nq, h, 1] in float32."""
    return lse.to(torch.float32).transpose(1, 2).unsqueeze(-1)
