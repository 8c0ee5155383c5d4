"""Merging partial attention results. Knows nothing of ranks, tiles or kernels.

Note [A merge that cannot overflow]
    With the difference of two log-sum-exps, the new output is `lerp(out, block, sigmoid(diff))`:
    the sigmoid saturates where `exp` would overflow. The difference is undefined in one case, both
    at -inf (a row that has seen no key yet meets a block that shows it none); there the weight is 0
    and `logaddexp` keeps -inf.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 256
"""Rows merged at a time on a CPU, so that the cast of a half-precision block stays in the cache."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: the dtype of partial results and of softmax_lse."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_(out: Tensor, softmax_lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge the attention over some keys into the attention over other keys, in place.

    Args:
        out: [batch, rows, num_heads, head_dim], float32 or float64; 0 where nothing was seen yet.
        softmax_lse: [batch, num_heads, rows], the natural-log normaliser of `out`; -inf likewise.
        block_out: as `out`, any floating dtype.
        block_lse: as `softmax_lse`.

    On CUDA one kernel where triton is installed, which torch's CUDA builds bring along, and can
    compile: 10 bytes of memory traffic per element of a bfloat16 block, where the operators of
    torch need 36.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867.
    """
    merge = _merge_of(out.device.type)
    merge(out, softmax_lse, block_out, block_lse)


def eager_merge_(out: Tensor, softmax_lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """`merge_` in operators of torch, on any device."""
    # Note [A merge that cannot overflow].
    weight = torch.sigmoid(block_lse - softmax_lse).masked_fill_(block_lse == -torch.inf, 0.0)
    torch.logaddexp(softmax_lse, block_lse, out=softmax_lse)
    weight = weight.transpose(1, 2).unsqueeze(-1)
    at_once = ROWS_AT_ONCE if out.device.type == "cpu" else max(1, out.shape[1])
    for start in range(0, out.shape[1], at_once):
        rows = slice(start, start + at_once)
        out[:, rows].lerp_(block_out[:, rows].to(out.dtype), weight[:, rows])


@lru_cache
def _merge_of(device_type: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    if device_type != "cuda":
        return eager_merge_
    try:
        from nnscaler_ring.core.sums.fused_merge import fused_merge_, try_out

        try_out(device_type)
    except ImportError as error:
        logger.info("partial results are merged by operators of torch: %s", error)
        return eager_merge_
    except Exception as error:
        logger.warning(
            "partial results are merged by operators of torch, which is slower: %s", error
        )
        return eager_merge_
    return fused_merge_


class PartialOutput:
    """The output of some query rows over the keys seen so far.

    A first block that covers every row is kept as it is, without a copy and in its own dtype: what
    is computed in one kernel call costs nothing here.
    """

    def __init__(self, q: Tensor, v_head_dim: int) -> None:
        batch, rows, num_heads, _ = q.shape
        self._shape = (batch, rows, num_heads, v_head_dim)
        self._device = q.device
        self.dtype = accumulation_dtype(q.dtype)
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def merge_(self, rows: slice, block_out: Tensor, block_lse: Tensor) -> None:
        """Merge a block for `rows`; out [b, rows, h, d], lse [b, h, rows]."""
        if self._out is None and block_out.shape[1] == self._shape[1]:
            self._out, self._lse = block_out, block_lse
            return
        out, lse = self._accumulators()
        merge_(out[:, rows], lse[..., rows], block_out, block_lse)

    def current(self) -> tuple[Tensor, Tensor]:
        """(out, softmax_lse) as they stand; 0 and -inf for rows that saw no key."""
        if self._out is None or self._lse is None:
            return self._accumulators()
        return self._out, self._lse

    def _accumulators(self) -> tuple[Tensor, Tensor]:
        if self._out is None or self._lse is None:
            batch, rows, num_heads, _ = self._shape
            self._out = torch.zeros(self._shape, dtype=self.dtype, device=self._device)
            # Rows before heads in memory, as out has them: a merge then walks both in order.
            lse = self._out.new_full((batch, rows, num_heads), -torch.inf)
            self._lse = lse.transpose(1, 2)
        elif self._out.dtype != self.dtype:
            self._out = self._out.to(self.dtype)
        return self._out, self._lse
