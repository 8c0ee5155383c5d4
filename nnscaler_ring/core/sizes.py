"""Bytes and FLOPs of one attention layer's rows: the units that all predictions are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nnscaler_ring.core.exchange import Sent
from nnscaler_ring.core.kernels import Problem
from nnscaler_ring.core.sums.online_softmax import accumulation_dtype

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
SHORT_NAMES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Sizes:
    """Heads, head dims, batch and dtype of one attention layer.

    A *row* is one token of one batch entry's tensors, all heads; all figures count the whole batch.

    Raises:
        ValueError: a number below 1, heads that the KV heads do not divide, an unknown dtype.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: str = "float32"
    batch: int = 1

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_dim", "v_head_dim", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads={self.num_heads}, got {self.num_kv_heads}."
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {(*DTYPES,)}, got {self.dtype!r}.")

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

    def sent_bytes(self, sent: Sent) -> SentBytes:
        """What an exchange's plan says that it sends, in bytes."""
        row = self.kv_numbers
        kv = sent.kv_rows * row * self.itemsize
        gradient = row * (
            sent.gradient_rows * self.itemsize + sent.summed_gradient_rows * self.sum_itemsize
        )
        return SentBytes(kv, kv, gradient)

    def problem(self, device_type: str) -> Problem:
        """What a kernel must be able to do."""
        return Problem(
            device_type,
            self.torch_dtype,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.v_head_dim,
        )


@dataclass(frozen=True)
class SentBytes:
    """Payload that one rank sends in a forward and a backward pass; relayout is not in it."""

    forward_kv_bytes: int
    backward_kv_bytes: int
    gradient_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.forward_kv_bytes + self.backward_kv_bytes + self.gradient_bytes


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its peak, by component."""

    components: dict[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.components.values())


def dtype_name(name: str) -> str:
    """The full name of a dtype, short names such as bf16 allowed.

    Raises:
        ValueError: not a dtype that attention is computed in.
    """
    full = SHORT_NAMES.get(name, name)
    if full not in DTYPES:
        raise ValueError(f"dtype must be one of {(*DTYPES, *SHORT_NAMES)}, got {name!r}.")
    return full
