"""Memory of an exchange: rows of K and V in one piece, and the gradients of a rank's own rows."""

from __future__ import annotations

import torch
from torch import Tensor

from nnscaler_ring.core.exchange.contract import GradientStep, Keys
from nnscaler_ring.core.plan.schedule import Rows
from nnscaler_ring.core.ranks.transport import Message
from nnscaler_ring.core.sums.row_sum import RowSum


class Buffer:
    """Memory for some rows of K and V in one piece, so that one message can fill it."""

    def __init__(self, k: Tensor, v: Tensor, rows: int, dtype: torch.dtype) -> None:
        shapes = [(x.shape[0], rows, *x.shape[2:]) for x in (k, v)]
        sizes = [torch.Size(shape).numel() for shape in shapes]
        self._whole = k.new_empty(sum(sizes), dtype=dtype)
        parts = self._whole.split(sizes)
        self.k, self.v = (x.view(shape) for x, shape in zip(parts, shapes, strict=True))

    def messages(self, block: int, apart: bool) -> list[Message]:
        """To fill it from, or send it to, a block: K and V apart, or both as one message."""
        tensors = (self.k, self.v) if apart else (self._whole,)
        return [Message(block, tensor) for tensor in tensors]


class Home:
    """Sums of dK and dV for the rows that this rank owns."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.dk, self.dv = RowSum(k), RowSum(v)

    def add_(self, rows: Rows, dk: Tensor, dv: Tensor) -> None:
        """Add gradients of runs of rows that lie one after another in dk and dv."""
        offset = 0
        for start, stop in rows:
            piece = slice(offset, offset + stop - start)
            self.dk.add_(slice(start, stop), dk[:, piece])
            self.dv.add_(slice(start, stop), dv[:, piece])
            offset += stop - start

    def step(self, keys: Keys) -> GradientStep:
        """The local step: its gradients are at home already."""
        return GradientStep(*keys, self.dk, self.dv)
