"""Masks: which query sees which key, one kind a file. Integers only, no torch."""

from nnscaler_ring.core.plan.masks.chunks import Chunks
from nnscaler_ring.core.plan.masks.contract import Band, Mask
from nnscaler_ring.core.plan.masks.documents import Documents
from nnscaler_ring.core.plan.masks.prefix import Prefix
from nnscaler_ring.core.plan.masks.rectangles import Rectangle, Rectangles
from nnscaler_ring.core.plan.masks.text import KINDS, mask_of
from nnscaler_ring.core.plan.masks.window import CAUSAL, FULL, Window

__all__ = [
    "CAUSAL",
    "FULL",
    "KINDS",
    "Band",
    "Chunks",
    "Documents",
    "Mask",
    "Prefix",
    "Rectangle",
    "Rectangles",
    "Window",
    "mask_of",
]
