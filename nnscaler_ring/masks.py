"""Masks that the attention functions take as `mask=`: values without tensors, made once.

    wrap_ring_attn_func(q, k, v, mask=Chunks(8192))
    wrap_ring_attn_func(q, k, v, mask=CAUSAL & (Window(left=4096) | Rectangles([(0, n, 0, 4)])))

`a & b` shows what both show, `a | b` what one of them shows. `str(mask)` is text that makes the
same mask, and is taken in its place, from a configuration file say.
"""

from nnscaler_ring.core.plan.masks import (
    CAUSAL,
    FULL,
    Chunks,
    Documents,
    Mask,
    Prefix,
    Rectangle,
    Rectangles,
    Window,
    mask_of,
)

__all__ = [
    "CAUSAL",
    "FULL",
    "Chunks",
    "Documents",
    "Mask",
    "Prefix",
    "Rectangle",
    "Rectangles",
    "Window",
    "mask_of",
]
