"""Attention kernels: one tile on one device each. `contract.py` says what a kernel is,
`registry.py` which there are; every other file is one of them, or what several share.
Adapters never import each other: one that needs another asks `offer_of` for it by name.
"""

from nnscaler_ring.core.kernels.contract import (
    AttentionKernel,
    BackwardTensors,
    KernelOffer,
    Problem,
    TileGradients,
)
from nnscaler_ring.core.kernels.registry import (
    AUTO_KERNELS,
    KERNELS,
    WHOLE_OPS,
    auto_kernels,
    kernel_refusals,
    offer_of,
    select_kernel,
)

__all__ = [
    "AUTO_KERNELS",
    "KERNELS",
    "WHOLE_OPS",
    "AttentionKernel",
    "BackwardTensors",
    "KernelOffer",
    "Problem",
    "TileGradients",
    "auto_kernels",
    "kernel_refusals",
    "offer_of",
    "select_kernel",
]
