"""Models whose sequence may be shared: on one device, under torchrun and under nnScaler alike.

Every model takes `process_group=None`; `ring_size` with a group is its size or None. Initialisation
depends on neither. Gradients are each rank's part: `sum_gradients` adds them up.
"""

from nnscaler_ring.models.decoder_layer import DecoderLayer
from nnscaler_ring.models.energy_transformer_block import EnergyTransformerBlock
from nnscaler_ring.models.ring_attention import RingAttention
from nnscaler_ring.models.ring_attention_model import RingAttentionModel
from nnscaler_ring.models.transformer import Transformer, TransformerConfig
from nnscaler_ring.training import even_shard_lens, positions_of_shard, sum_gradients

__all__ = [
    "DecoderLayer",
    "EnergyTransformerBlock",
    "RingAttention",
    "RingAttentionModel",
    "Transformer",
    "TransformerConfig",
    "even_shard_lens",
    "positions_of_shard",
    "sum_gradients",
]
