"""Models written for nnScaler's own ring ops, of which only the import was changed."""

from typing import Any

from torch import Tensor, nn

from nnscaler_ring.compat.nnscaler import (
    wrap_maybe_shuffle,
    wrap_maybe_unshuffle,
    wrap_ring_attn_func,
    wrap_ring_attn_varlen_func,
    wrap_sliding_window_attn_func,
    wrap_zigzag_allgather_attn_varlen_func,
    wrap_zigzag_attn_func,
)

DENSE = {"ring": wrap_ring_attn_func, "zigzag": wrap_zigzag_attn_func}


class DenseCall(nn.Module):
    """Ring or zigzag, with the settings that nnScaler's own runners use."""

    def __init__(self, op: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.op, self.options = op, options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.op == "ring":
            return wrap_ring_attn_func(q, k, v, **self.options)
        return wrap_zigzag_attn_func(q, k, v, **self.options)


class PackedCall(nn.Module):
    """Their varlen op by position, or the sliding window; `options` by keyword."""

    def __init__(self, op: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.op, self.options = op, options

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, slopes: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if self.op == "sliding":
            return wrap_sliding_window_attn_func(q, k, v, cu_q, cu_k, None, **self.options)
        return wrap_ring_attn_varlen_func(
            q, k, v, cu_q, cu_k, slopes, 0.0, None, self.options.get("causal", False), **self.rest()
        )

    def rest(self) -> dict[str, Any]:
        return {name: value for name, value in self.options.items() if name != "causal"}


class Shuffled(nn.Module):
    """A layer of packed tokens whose queries lie in zigzag order and whose keys are gathered."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x: Tensor, cu: Tensor, weights: Tensor) -> Tensor:
        x = wrap_maybe_shuffle(x, cu)
        q = self.to_q(x).view(-1, self.num_heads, self.head_dim)
        k = wrap_maybe_unshuffle(self.to_k(x), cu).view(-1, self.num_heads, self.head_dim)
        v = wrap_maybe_unshuffle(self.to_v(x), cu).view(-1, self.num_heads, self.head_dim)
        out = wrap_zigzag_allgather_attn_varlen_func(q, k, v, cu, cu, None, causal=True)
        return (wrap_maybe_unshuffle(out, cu) * weights).sum()
