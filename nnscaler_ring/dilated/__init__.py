"""Modules of dilated attention (LongNet) whose sequence a ring of ranks may share.

docs/dilated.md says of every argument whether it is honoured, and why not.
"""

from nnscaler_ring.dilated.limits import BufferLimitError, BufferLimits
from nnscaler_ring.dilated.ring_advanced_distributed_dilated_attention import (
    RingAdvancedDistributedDilatedAttention,
)
from nnscaler_ring.dilated.ring_attention_tester import RingAttentionTester
from nnscaler_ring.dilated.ring_dilated_attention import RingDilatedAttention
from nnscaler_ring.dilated.ring_multihead_dilated_attention import RingMultiheadDilatedAttention
from nnscaler_ring.dilated.ring_transformer import RingTransformer, RingTransformerLayer
from nnscaler_ring.dilated.sizing import (
    calculate_optimal_ring_size,
    optimize_block_size,
    optimize_segment_lengths,
)
from nnscaler_ring.dilated.training_checkpoints import TrainingCheckpoints

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
