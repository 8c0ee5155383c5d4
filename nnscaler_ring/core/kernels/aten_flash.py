"""torch's flash-attention operators, dense and packed, in the calling form of flash_form.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nnscaler_ring.core.kernels.contract import BackwardTensors
from nnscaler_ring.core.kernels.flash_form import FlashCall, Packed

aten = torch.ops.aten


class AtenFlash:
    """FlashAttention-2 as torch ships it, or what is mounted in its place."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: FlashCall) -> tuple[Tensor, Tensor]:
        bounds, (left, right) = _bounds(q, k, call.packed), _edges(call)
        out, softmax_lse, *_ = aten._flash_attention_forward(
            q,
            k,
            v,
            *bounds,
            0.0,
            call.causal,
            False,
            scale=call.softmax_scale,
            window_size_left=left,
            window_size_right=right,
        )
        return out, softmax_lse

    def backward(self, tensors: BackwardTensors, call: FlashCall) -> tuple[Tensor, Tensor, Tensor]:
        dout, _, q, k, v, out, softmax_lse = tensors
        bounds, (left, right) = _bounds(q, k, call.packed), _edges(call)
        # The state of a generator that no dropout asks.
        seed, unused = q.new_empty(2, dtype=torch.uint64), q.new_empty((), dtype=torch.uint64)
        with _deterministic_algorithms(call.deterministic):
            dq, dk, dv = aten._flash_attention_backward(
                dout,
                q,
                k,
                v,
                out,
                softmax_lse,
                *bounds,
                0.0,
                call.causal,
                seed,
                unused,
                scale=call.softmax_scale,
                window_size_left=left,
                window_size_right=right,
            )
        return dq, dk, dv


def _bounds(
    q: Tensor, k: Tensor, packed: Packed | None
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """cum_seq_q, cum_seq_k, max_q, max_k."""
    return (None, None, q.shape[1], k.shape[1]) if packed is None else packed


def _edges(call: FlashCall) -> tuple[int | None, int | None]:
    """None for unbounded: what torch may have mounted instead of its own kernel wants it so."""
    return None if call.left < 0 else call.left, None if call.right < 0 else call.right


@contextmanager
def _deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """torch's flash backward has no argument for it and reads the global switch."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
