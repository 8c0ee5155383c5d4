"""Which kernels there are, and which of them computes a call.

A new kernel is one file with a class that has the members of `KernelOffer`, a name in `KERNELS` and
a `case` in `offer_of`. What it prepares has the members of `AttentionKernel`, and may be the same
object. Only `offer_of` imports the kernels' files: each when it is asked for.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import lru_cache

import torch

from nnscaler_ring.core.kernels.contract import AttentionKernel, KernelOffer, Problem

logger = logging.getLogger(__name__)

KERNELS = (
    "cpu_tiles",
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

AUTO_KERNELS = ("cpu_tiles", "torch_cpu", "flash_attn_3", "torch_cuda")
"""What `kernel="auto"` picks from, in the order in which it asks; but see `auto_kernels`.

`reference` builds whole score matrices: it must be asked for. So must flash-attn 4, a beta."""


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

    On a CPU torch's fused kernel comes first where it is the faster: see `torch_is_faster`.
    torch ships flash-attn 2, so an installed one is asked for a softcap alone: torch computes that
    in blocks of scores.
    """
    if problem.softcap:
        return "cpu_tiles", "torch_cpu", "flash_attn_3", "flash_attn", "torch_cuda"
    if problem.device_type == "cpu" and _torch_is_faster(problem):
        return "torch_cpu", *(name for name in AUTO_KERNELS if name != "torch_cpu")
    return AUTO_KERNELS


def _torch_is_faster(problem: Problem) -> bool:
    from nnscaler_ring.core.kernels.cpu_tiles import torch_is_faster

    return torch_is_faster(problem)


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
        case "cpu_tiles":
            from nnscaler_ring.core.kernels.cpu_tiles import CpuTiles

            return CpuTiles()
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
