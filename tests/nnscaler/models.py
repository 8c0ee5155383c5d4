"""Models that nnScaler traces; it needs their source, so they live in a module."""

from typing import Any

from torch import Tensor, nn

import nnscaler_ring
from nnscaler_ring import wrap_ring_attn_func
from nnscaler_ring.ring_attn_varlen import wrap_ring_attn_varlen_func as varlen


class OneCall(nn.Module):
    """One call of an op, found in the three ways that users write."""

    def __init__(self, op: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.op = op
        self.options = options

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        if self.op == "ring":
            return wrap_ring_attn_func(q, k, v, **self.options)
        if self.op == "zigzag":
            return nnscaler_ring.wrap_zigzag_attn_func(q, k, v, **self.options)
        return varlen(q, k, v, cu_q, cu_k, **self.options)
