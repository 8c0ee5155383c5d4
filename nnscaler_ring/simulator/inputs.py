"""Where q, k, v and dout come from: tensors of the whole sequence, or the number of the token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nnscaler_ring.core.sizes import Sizes

NAMES = ("q", "k", "v", "dout")


class Inputs(Protocol):
    """The inputs of an attention call, any rows of them."""

    def rows(self, name: str, tokens: Tensor) -> Tensor:
        """Rows of q, k, v or dout at some tokens (int64): [batch, tokens, heads, head_dim]."""
        ...


class WholeInputs:
    """Tensors of the whole sequence, [batch, tokens, heads, head_dim]."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None = None) -> None:
        self._tensors = {"q": q, "k": k, "v": v, "dout": dout}

    def rows(self, name: str, tokens: Tensor) -> Tensor:
        """Copies of the rows.

        Raises:
            ValueError: dout is asked for, and there is none.
        """
        x = self._tensors[name]
        if x is None:
            raise ValueError("the backward pass needs dout; give it to WholeInputs.")
        return x.index_select(1, tokens.to(x.device))


@dataclass(frozen=True)
class GeneratedInputs:
    """Every number is a function of the token's 64-bit place, the head, the dim, and the seed.

    Uniform with mean 0 and variance 1, independent as far as the mixing goes; the same on every
    device. So any rank can make any rows of a sequence that nobody holds.

    Source: the mixing is MurmurHash3's 32-bit finalizer (Appleby), twice.
    """

    sizes: Sizes
    seed: int = 0
    device: str = "cpu"

    def rows(self, name: str, tokens: Tensor) -> Tensor:
        """Made anew at every call; on a CPU in pieces that fit its cache, else in large ones."""
        s = self.sizes
        heads = s.num_heads if name in ("q", "dout") else s.num_kv_heads
        head_dim = s.head_dim if name in ("q", "k") else s.v_head_dim
        salt = (self.seed * len(NAMES) + NAMES.index(name) + 1) * 0x9E3779B9
        columns = torch.arange(s.batch * heads * head_dim, device=self.device)
        columns = _mix(columns.add_(salt).bitwise_and_(_LOW)).view(1, -1)
        rows = torch.empty(len(tokens), columns.numel(), dtype=s.torch_dtype, device=self.device)
        at_once = _NUMBERS_ON_CPU if columns.device.type == "cpu" else _NUMBERS_ON_GPU
        step = max(1, at_once // columns.numel())
        for start in range(0, len(tokens), step):
            piece = tokens[start : start + step].to(self.device)
            low = _mix(piece.bitwise_and(_LOW))
            key = _mix(low.add_(piece.bitwise_right_shift(32)).bitwise_and_(_LOW)).unsqueeze(1)
            bits = _mix(key.bitwise_xor(columns))
            rows[start : start + step] = bits.to(torch.float32).mul_(_SCALE).sub_(_HALF_WIDTH)
        by_token = rows.view(len(tokens), s.batch, heads, head_dim)
        return by_token.transpose(0, 1).contiguous()


_LOW = 0xFFFFFFFF
_NUMBERS_ON_CPU = 1 << 16
_NUMBERS_ON_GPU = 1 << 24
"""Made at once, 8 bytes each; a GPU would wait for the launches of smaller kernels."""

_HALF_WIDTH = 3**0.5
"""A uniform distribution of variance 1 reaches so far to both sides."""

_SCALE = 2 * _HALF_WIDTH / 2**32


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers, held in int64, in place; products wrap and are cut."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x.bitwise_xor_(x.bitwise_right_shift(shift)).mul_(factor).bitwise_and_(_LOW)
    return x.bitwise_xor_(x.bitwise_right_shift(16))
