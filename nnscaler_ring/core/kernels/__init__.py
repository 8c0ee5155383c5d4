"""Attention kernels: one tile on one device, behind one protocol. Kernels never import each other.

A new kernel is one file with a class that has the members of `AttentionKernel`, and a `case` in
`_load`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from nnscaler_ring.core.scores import ScoreMods
from nnscaler_ring.core.tile import Tile

if TYPE_CHECKING:
    from nnscaler_ring.core.kernels.tile_math import TileGradients

logger = logging.getLogger(__name__)

KERNELS = ("torch_cpu", "reference")
"""Kernel names in the order in which `kernel="auto"` asks them."""

AUTO_KERNELS = ("torch_cpu",)
"""What `kernel="auto"` may pick. `reference` builds whole score matrices: it must be asked for."""


@dataclass(frozen=True)
class Problem:
    """What a kernel must be able to do for a call, apart from the shapes of single tiles."""

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


class AttentionKernel(Protocol):
    """Attention of one trimmed tile, q [b, nq, h, d], k [b, nk, h_kv, d], v [b, nk, h_kv, dv].

    `window` is flash-attn's `(left, right)`: bottom-right aligned, -1 for unbounded. Every query
    row is in reach of at least one key (Note [Trimmed tiles] in tile.py). nq and nk are at least 1.
    The tiles that reach `forward` and `backward` are those that `calls` returned. `mods` is what
    happens to the scores beside scale and window, None for nothing.
    """

    name: str

    def supports(self, problem: Problem) -> str | None:
        """None if the kernel can do it, else the reason why it cannot."""
        ...

    def calls(self, tiles: Sequence[Tile], *, plain: bool) -> Sequence[Tile]:
        """The same pairs as trimmed tiles that this kernel computes in one call each.

        `plain`: the calls have no `mods`.
        """
        ...

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        softmax_scale: float,
        window: tuple[int, int],
        mods: ScoreMods | None,
    ) -> tuple[Tensor, Tensor]:
        """(out [b, nq, h, dv] in q's dtype or wider, softmax_lse [b, h, nq] in float32/64)."""
        ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dlse: Tensor | None,
        *,
        softmax_scale: float,
        window: tuple[int, int],
        mods: ScoreMods | None,
    ) -> TileGradients:
        """Of this tile, fresh tensors, from the **global** out and softmax_lse.

        `dlse` [b, h, nq] is the gradient of softmax_lse, None for none.
        """
        ...


def select_kernel(name: str, problem: Problem) -> AttentionKernel:
    """The kernel called `name`, or for "auto" the first that can do it.

    Raises:
        ValueError: the kernel, or every kernel that auto may pick, refuses; with the reasons.
    """
    names = AUTO_KERNELS if name == "auto" else (name,)
    refusals: dict[str, str] = {}
    for candidate in names:
        kernel = _load(candidate)
        reason = kernel.supports(problem)
        if reason is None:
            logger.debug(
                "kernel=%r picked %s for %s; refused: %s", name, candidate, problem, refusals
            )
            return kernel
        refusals[candidate] = reason
    reasons = "; ".join(f"{candidate}: {reason}" for candidate, reason in refusals.items())
    raise ValueError(
        f"kernel={name!r} cannot compute this call ({reasons}); "
        "kernel='reference' computes anything torch can, slowly and with whole score matrices."
    )


def kernel_refusals(problem: Problem) -> dict[str, str | None]:
    """For every kernel None if it can do `problem`, else its reason."""
    return {name: _load(name).supports(problem) for name in KERNELS}


@lru_cache
def _load(name: str) -> AttentionKernel:
    match name:
        case "reference":
            from nnscaler_ring.core.kernels.reference import Reference

            return Reference()
        case "torch_cpu":
            from nnscaler_ring.core.kernels.torch_cpu import TorchCpu

            return TorchCpu()
    raise ValueError(f"kernel must be 'auto' or one of {KERNELS}, got {name!r}; use 'auto'.")
