"""What one attention layer sends, in bytes: the units that all predictions are made of."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nnscaler_ring.core.exchange import Sent
from nnscaler_ring.core.kernels import Problem
from nnscaler_ring.core.shape import DTYPES, AttentionShape

SHORT_NAMES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)  # so that __init__ calls the checks
class Sizes(AttentionShape):
    """Heads, head dims, batch and dtype of one attention layer, and the bytes that it sends.

    Raises:
        ValueError: a number below 1, heads that the KV heads do not divide, an unknown dtype.
    """

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

    def sent_bytes(self, sent: Sent) -> SentBytes:
        """What an exchange's plan says that it sends, in bytes."""
        row = self.kv_numbers
        kv = sent.kv_rows * row * self.itemsize
        gradient = row * (
            sent.gradient_rows * self.itemsize + sent.summed_gradient_rows * self.sum_itemsize
        )
        return SentBytes(kv, kv, gradient)

    def problem(self, device_type: str) -> Problem:
        """What a kernel must be able to do on such a device."""
        return Problem.of(replace(self, device_type=device_type))


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
