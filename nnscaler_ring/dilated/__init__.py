"""Modules of dilated attention (LongNet) whose sequence a ring of ranks may share.

docs/dilated.md says of every argument whether it is honoured, and why not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nnscaler_ring.dilated.limits import BufferLimitError, BufferLimits
from nnscaler_ring.dilated.ring_advanced_distributed_dilated_attention import (
    RingAdvancedDistributedDilatedAttention,
)
from nnscaler_ring.dilated.ring_dilated_attention import RingDilatedAttention
from nnscaler_ring.dilated.ring_multihead_dilated_attention import RingMultiheadDilatedAttention
from nnscaler_ring.dilated.ring_transformer import RingTransformer, RingTransformerLayer
from nnscaler_ring.dilated.sizing import (
    calculate_optimal_ring_size,
    optimize_block_size,
    optimize_segment_lengths,
)
from nnscaler_ring.training import TrainingCheckpoints

if TYPE_CHECKING:
    from nnscaler_ring.dilated.ring_attention_tester import RingAttentionTester

__all__ = [
    "BufferLimitError",
    "BufferLimits",
    "RingAdvancedDistributedDilatedAttention",
    "RingAttentionTester",
    "RingDilatedAttention",
    "RingMultiheadDilatedAttention",
    "RingTransformer",
    "RingTransformerLayer",
    "TrainingCheckpoints",
    "calculate_optimal_ring_size",
    "optimize_block_size",
    "optimize_segment_lengths",
]


def __getattr__(name: str) -> Any:
    # The tester starts ranks and measures memory: it comes with the tools, when it is asked for.
    if name == "RingAttentionTester":
        return import_module("nnscaler_ring.dilated.ring_attention_tester").RingAttentionTester
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
