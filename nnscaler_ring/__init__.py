"""Exact attention over sequences too long for one device, on any number of ranks.

Importing this package imports torch and the standard library only.
"""

from typing import TYPE_CHECKING, Any

from nnscaler_ring import dilated_attn, masks, ring_attn, ring_attn_varlen, zigzag_attn
from nnscaler_ring.core.op import flops
from nnscaler_ring.core.plan.dilation import HeadOffsets
from nnscaler_ring.core.ranks.groups import Traffic, set_agreement_timeout, set_step, traffic
from nnscaler_ring.core.scores.dropout import DropoutSeed
from nnscaler_ring.decode_attn import decode_attention
from nnscaler_ring.merge_attn import merge_attention
from nnscaler_ring.nnscaler_hook import register_when_imported
from nnscaler_ring.packed import packed_positions, packed_rows, packed_shard_lens
from nnscaler_ring.zigzag_attn import zigzag_positions, zigzag_shard, zigzag_unshard

if TYPE_CHECKING:
    from nnscaler_ring.dilated_attn import wrap_dilated_attn_func
    from nnscaler_ring.ring_attn import wrap_ring_attn_func
    from nnscaler_ring.ring_attn_varlen import wrap_ring_attn_varlen_func
    from nnscaler_ring.zigzag_attn import wrap_zigzag_attn_func

__version__ = "0.1.0"

__all__ = [
    "DropoutSeed",
    "HeadOffsets",
    "Traffic",
    "decode_attention",
    "masks",
    "merge_attention",
    "packed_positions",
    "packed_rows",
    "packed_shard_lens",
    "set_agreement_timeout",
    "set_step",
    "traffic",
    "wrap_dilated_attn_func",
    "wrap_ring_attn_func",
    "wrap_ring_attn_varlen_func",
    "wrap_zigzag_attn_func",
    "zigzag_positions",
    "zigzag_shard",
    "zigzag_unshard",
]

# Looked up in their modules at every access: while nnScaler traces a model it replaces them there,
# and `nnscaler_ring.wrap_ring_attn_func(...)` in a model must find the replacement.
_OPS = {
    "wrap_dilated_attn_func": dilated_attn,
    "wrap_ring_attn_func": ring_attn,
    "wrap_ring_attn_varlen_func": ring_attn_varlen,
    "wrap_zigzag_attn_func": zigzag_attn,
}


def __getattr__(name: str) -> Any:
    if name in _OPS:
        return getattr(_OPS[name], name)
    raise AttributeError(f"module 'nnscaler_ring' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_OPS})


register_when_imported()
flops.register_when_imported()
