"""Attention kernels: one tile on one device, behind one protocol.

Adapters never import each other: one that needs another asks `offer_of` for it by name.
A new kernel is one file with a class that has the members of `KernelOffer`, and a `case` in
`offer_of`. What it prepares has the members of `AttentionKernel`, and may be the same object.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from nnscaler_ring.core.plan.tile import KernelCall, Segments, Tile
from nnscaler_ring.core.scores.scores import ScoreMods

if TYPE_CHECKING:
    from nnscaler_ring.core.kernels.tile_math import TileGradients

logger = logging.getLogger(__name__)

KERNELS = (
    "torch_cpu",
    "torch_cuda",
    "flash_attn",
    "flash_attn_3",
    "flash_attn_4",
    "torch_fa3",
    "torch_fa4",
    "reference",
)
"""Kernel names."""

WHOLE_OPS = ("transformer_engine",)
"""Other names that `kernel` may have: see core/op/whole_op.py."""

AUTO_KERNELS = ("torch_cpu", "flash_attn_3", "torch_cuda")
"""What `kernel="auto"` picks from, in the order in which it asks; but see `auto_kernels`.

`reference` builds whole score matrices: it must be asked for. So must flash-attn 4, a beta."""


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

    `window` is flash-attn's `(left, right)`: bottom-right aligned, -1 for unbounded. Every query
    row is in reach of at least one key (Note [Trimmed tiles] in tile.py). nq and nk are at least 1.
    What reaches `forward` and `backward` is what `calls` returned: a kernel whose `calls` makes
    batches of tiles gets their `segments` (Note [Tiles in one call] in tile.py), where rows may see
    no key; for other kernels they are None. `mods` is what happens to the scores beside scale and
    window, None for nothing.
    """

    @property
    def name(self) -> str:
        """As in `KERNELS`."""
        ...

    def calls(self, tiles: Sequence[Tile], *, plain: bool) -> Sequence[KernelCall]:
        """The same pairs as trimmed tiles, or batches, that it computes in one call each.

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
        segments: Segments | None = None,
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
        segments: Segments | None = None,
    ) -> TileGradients:
        """Of this tile, fresh tensors, from the **global** out and softmax_lse.

        `dlse` [b, h, nq] is the gradient of softmax_lse, None for none.
        """
        ...


def select_kernel(name: str, problem: Problem) -> AttentionKernel:
    """The kernel called `name`, or for "auto" the first that can do it, ready for such problems.

    Raises:
        ValueError: the kernel, or every kernel that auto may pick, refuses; with the reasons.
    """
    problem = _on_this_machine(problem)
    names = auto_kernels(problem) if name == "auto" else (name,)
    refusals: dict[str, str] = {}
    for candidate in names:
        offer = offer_of(candidate)
        reason = offer.supports(problem)
        if reason is None:
            logger.debug(
                "kernel=%r picked %s for %s; refused: %s", name, candidate, problem, refusals
            )
            return offer.prepared(problem)
        refusals[candidate] = reason
    reasons = "; ".join(f"{candidate}: {reason}" for candidate, reason in refusals.items())
    raise ValueError(
        f"kernel={name!r} cannot compute this call ({reasons}); "
        "kernel='reference' computes anything torch can, slowly and with whole score matrices."
    )


def auto_kernels(problem: Problem) -> tuple[str, ...]:
    """The kernels that `kernel="auto"` asks about a problem, in this order.

    torch ships flash-attn 2, so an installed one is asked for a softcap alone: torch computes that
    in blocks of scores.
    """
    if problem.softcap:
        return "torch_cpu", "flash_attn_3", "flash_attn", "torch_cuda"
    return AUTO_KERNELS


def kernel_refusals(problem: Problem) -> dict[str, str | None]:
    """For every kernel None if it can do `problem`, else its reason."""
    problem = _on_this_machine(problem)
    return {name: offer_of(name).supports(problem) for name in KERNELS}


def _on_this_machine(problem: Problem) -> Problem:
    if problem.device_type != "cuda" or problem.compute_capability is not None:
        return problem
    if not torch.cuda.is_available():
        return problem
    return replace(problem, compute_capability=torch.cuda.get_device_capability())


@lru_cache
def offer_of(name: str) -> KernelOffer:
    """What stands behind a name."""
    match name:
        case "reference":
            from nnscaler_ring.core.kernels.reference import Reference

            return Reference()
        case "torch_cpu":
            from nnscaler_ring.core.kernels.torch_cpu import TorchCpu

            return TorchCpu()
        case "torch_cuda":
            from nnscaler_ring.core.kernels.torch_cuda import TorchCuda

            return TorchCuda()
        case "flash_attn" | "flash_attn_3" | "flash_attn_4":
            from nnscaler_ring.core.kernels.flash_attn import FLASH_ATTN

            return FLASH_ATTN[name]
        case "torch_fa3" | "torch_fa4":
            from nnscaler_ring.core.kernels.torch_mounted import MOUNTED

            return MOUNTED[name]
    raise ValueError(f"kernel must be 'auto' or one of {KERNELS}, got {name!r}; use 'auto'.")
