"""Exact attention over sequences too long for one device, on any number of ranks.

Importing this package imports torch and the standard library only.
"""

from nnscaler_ring.core.groups import Traffic, set_agreement_timeout, traffic
from nnscaler_ring.ring_attn import wrap_ring_attn_func
from nnscaler_ring.ring_attn_varlen import wrap_ring_attn_varlen_func
from nnscaler_ring.zigzag_attn import (
    wrap_zigzag_attn_func,
    zigzag_positions,
    zigzag_shard,
    zigzag_unshard,
)

__version__ = "0.1.0"

__all__ = [
    "Traffic",
    "set_agreement_timeout",
    "traffic",
    "wrap_ring_attn_func",
    "wrap_ring_attn_varlen_func",
    "wrap_zigzag_attn_func",
    "zigzag_positions",
    "zigzag_shard",
    "zigzag_unshard",
]
