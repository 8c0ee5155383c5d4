"""The shape of an attention call without its tokens, and the bytes and FLOPs of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from nnscaler_ring.core.sums.online_softmax import accumulation_dtype

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""What attention is computed in, by name."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class AttentionShape:
    """Heads, head dims, dtype, batch and device of q, k and v.

    A *row* is one token of one batch entry's tensors, all heads; all figures count the whole batch.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: str = "float32"
    batch: int = 1
    device_type: str = "cpu"

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> Self:
        """Of tensors [batch, tokens, heads, head_dim], or packed ones without batch."""
        *batch, _, num_heads, head_dim = q.shape
        heads = num_heads, k.shape[-2], head_dim, v.shape[-1]
        return cls._made(*heads, NAMES[q.dtype], batch[0] if batch else 1, q.device.type)

    @classmethod
    @lru_cache(maxsize=256)
    def _made(cls, *values: Any) -> Self:
        """Made once: a model makes the same call in every layer."""
        return cls(*values)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of q, k, v and the result."""
        return DTYPES[self.dtype]

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the input."""
        return self.torch_dtype.itemsize

    @property
    def sum_itemsize(self) -> int:
        """Bytes of a number of partial results, of sums and of softmax_lse."""
        return accumulation_dtype(self.torch_dtype).itemsize

    @property
    def q_numbers(self) -> int:
        """Numbers in a row of q."""
        return self.batch * self.num_heads * self.head_dim

    @property
    def out_numbers(self) -> int:
        """Numbers in a row of the result."""
        return self.batch * self.num_heads * self.v_head_dim

    @property
    def k_numbers(self) -> int:
        """Numbers in a row of k."""
        return self.batch * self.num_kv_heads * self.head_dim

    @property
    def v_numbers(self) -> int:
        """Numbers in a row of v."""
        return self.batch * self.num_kv_heads * self.v_head_dim

    @property
    def kv_numbers(self) -> int:
        """Numbers in a row of k together with a row of v."""
        return self.k_numbers + self.v_numbers

    @property
    def lse_bytes(self) -> int:
        """Bytes of a row of softmax_lse."""
        return self.batch * self.num_heads * self.sum_itemsize

    def flops(self, pairs: int, *, backward: bool) -> int:
        """Floating-point operations of so many visible pairs in one pass.

        Forward: scores and out. Backward: the scores again, dP, dV, dQ and dK.

        Source: Dao et al., "FlashAttention", arXiv 2205.14135, appendix B.
        """
        qk, pv = self.q_numbers, self.out_numbers
        return 2 * pairs * (3 * qk + 2 * pv if backward else qk + pv)
