"""Hugging Face transformers models on sequences too long for one device.

    from nnscaler_ring.hf import apply_ring_attention, shard_batch

    apply_ring_attention(model, process_group=mesh["cp"])
    batch = shard_batch(model, batch)
    num_items = batch.pop("num_items")
    loss = model(**batch, num_items_in_batch=num_items).loss

Needs transformers 4.57 or newer: `pip install nnscaler_ring[hf]`. docs/huggingface.md has the rest.
"""

try:
    import transformers as _transformers
except ImportError as error:
    raise ImportError(
        "nnscaler_ring.hf needs transformers 4.57 or newer; pip install 'nnscaler_ring[hf]'."
    ) from error

from nnscaler_ring.hf.attention_function import NAME, register_attention
from nnscaler_ring.hf.batch import shard_batch
from nnscaler_ring.hf.cache import RingCache
from nnscaler_ring.hf.model import apply_ring_attention
from nnscaler_ring.hf.sharding import Sharding
from nnscaler_ring.hf.trainer import RingTrainerMixin

__all__ = [
    "NAME",
    "RingCache",
    "RingTrainerMixin",
    "Sharding",
    "apply_ring_attention",
    "shard_batch",
]

del _transformers
register_attention()
