"""Sums of gradient blocks over rows, accumulated in float32. Knows nothing of ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from nnscaler_ring.core.sums.online_softmax import accumulation_dtype


class RowSum:
    """The sum of blocks that each cover some rows of a [batch, rows, heads, head_dim] tensor.

    A first block that is handed over and covers every row is kept as it is, without a copy and in
    its own dtype; the sum is float32 (float64 for float64) from the second block on.
    """

    def __init__(self, like: Tensor) -> None:
        # Not the tensor itself: its memory may be needed before the sum is.
        self._shape, self._like_dtype, self._device = like.shape, like.dtype, like.device
        self._dtype = accumulation_dtype(like.dtype)
        self._sum: Tensor | None = None

    def take_(self, rows: slice, block: Tensor) -> None:
        """Add a block that the caller gives away: a fresh tensor, not a view of a shared one."""
        if self._sum is None and block.shape[1] == self._shape[1]:
            self._sum = block
        else:
            self.add_(rows, block)

    def add_(self, rows: slice, block: Tensor) -> None:
        """Add a block of as many rows as the slice has."""
        if self._sum is None:
            self._sum = torch.zeros(self._shape, dtype=self._dtype, device=self._device)
        elif self._sum.dtype != self._dtype:
            self._sum = self._sum.to(self._dtype)
        self._sum[:, rows].add_(block)

    def current(self) -> Tensor:
        """The sum as it stands; zeros if nothing was added."""
        if self._sum is None:
            return torch.zeros(self._shape, dtype=self._like_dtype, device=self._device)
        return self._sum
