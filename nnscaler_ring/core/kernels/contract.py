"""What a kernel is: attention of one tile on one device. The shapes that every kernel shares.

`forward(q, k, v, scores)` and `backward(tensors, scores)` compute one call: `scores` says how the
scores come about (scale, window, and what else changes them), `tensors` are the seven tensors of a
backward pass under their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nnscaler_ring.core.plan.tile import KernelCall, Tile
from nnscaler_ring.core.scores.scores import TileScores
from nnscaler_ring.core.shape import AttentionShape


@dataclass(frozen=True)
class Problem:
    """What a kernel must be able to do for a call, apart from the shapes of single tiles.

    `compute_capability` is the CUDA device's; None: that of the current device, if there is one.
    """

    device_type: str
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    deterministic: bool = False
    softcap: bool = False
    alibi: bool = False
    bias: bool = False
    dropout: bool = False
    compute_capability: tuple[int, int] | None = None

    @classmethod
    def of(cls, shape: AttentionShape, **options: Any) -> Problem:
        """The problem of tensors of a shape, with which options are asked for."""
        return cls(
            shape.device_type,
            shape.torch_dtype,
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.v_head_dim,
            **options,
        )


class BackwardTensors(NamedTuple):
    """What a backward pass reads, of a whole call or of one tile of it.

    `out` and `softmax_lse` are the **merged** ones of the whole call, also in a tile: see Note
    [Global out and softmax_lse] in engine.py.

    Args:
        dout: gradient of out, [batch, nq, num_heads, v_head_dim].
        dlse: gradient of softmax_lse, as long as it; None for none.
        q: [batch, nq, num_heads, head_dim].
        k: [batch, nk, num_kv_heads, head_dim].
        v: [batch, nk, num_kv_heads, v_head_dim].
        out: as dout.
        softmax_lse: [batch, num_heads, nq], float32 or float64.
    """

    dout: Tensor
    dlse: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    softmax_lse: Tensor

    def of_call(self, call: KernelCall, k: Tensor, v: Tensor) -> BackwardTensors:
        """Those of one kernel call, whose keys and values are rows of `k` and `v`."""
        q_rows, k_rows = call.q, call.k
        return BackwardTensors(
            self.dout[:, q_rows],
            None if self.dlse is None else self.dlse[..., q_rows],
            self.q[:, q_rows],
            k[:, k_rows],
            v[:, k_rows],
            self.out[:, q_rows],
            self.softmax_lse[..., q_rows],
        )


class TileGradients(NamedTuple):
    """Gradients of one call; `dbias` [batch, num_heads, nq, nk] only where it was asked for."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None = None


class KernelOffer(Protocol):
    """What a name in `KERNELS` stands for."""

    @property
    def name(self) -> str:
        """The name."""
        ...

    def supports(self, problem: Problem) -> str | None:
        """None if it can do it, else the reason why it cannot."""
        ...

    def prepared(self, problem: Problem) -> AttentionKernel:
        """The kernel for calls like `problem`, which it supports."""
        ...


class AttentionKernel(Protocol):
    """Attention of one trimmed tile, q [b, nq, h, d], k [b, nk, h_kv, d], v [b, nk, h_kv, dv].

    nq and nk are at least 1, and every query row is in reach of at least one key (Note [Trimmed
    tiles] in tile.py). What reaches `forward` and `backward` is what `calls` returned: a kernel
    whose `calls` makes batches of tiles gets their segments in `scores` (Note [Tiles in one call]
    in tile.py), where rows may see no key; other kernels get none. A kernel whose `supports`
    refuses softcap, ALiBi, bias and dropout gets no `scores.mods`.
    """

    @property
    def name(self) -> str:
        """As in `KERNELS`."""
        ...

    def calls(self, tiles: Sequence[Tile], *, plain: bool) -> Sequence[KernelCall]:
        """The same pairs as trimmed tiles, or batches, that it computes in one call each.

        `plain`: the calls have no `scores.mods`.
        """
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: TileScores) -> tuple[Tensor, Tensor]:
        """(out [b, nq, h, dv] in q's dtype or wider, softmax_lse [b, h, nq] in float32/64)."""
        ...

    def backward(self, tensors: BackwardTensors, scores: TileScores) -> TileGradients:
        """The gradients of this call's part, as fresh tensors."""
        ...
