"""MAGNETO's normalisation of the heads' output, before the last projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnscaler_ring.training.tensor_ranks import AllHeads


class HeadNorm(nn.Module):
    """LayerNorm over the channels of all heads, wherever they are.

    Args:
        width: channels of all heads together.
        ranks: who shares the heads.

    Source: Wang et al., "Foundation Transformers" (MAGNETO), arXiv 2210.06423.
    """

    def __init__(
        self,
        width: int,
        eps: float,
        ranks: AllHeads,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.width, self.eps, self.ranks = width, eps, ranks
        self.weight = ranks.share(nn.Parameter(torch.ones(width, device=device, dtype=dtype)), 0)
        self.bias = ranks.share(nn.Parameter(torch.zeros(width, device=device, dtype=dtype)), 0)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., channels of this rank's heads] -> the same shape."""
        weight, bias = self.ranks.local(self.weight), self.ranks.local(self.bias)
        if self.ranks.size == 1:
            return F.layer_norm(x, (self.width,), weight, bias, self.eps)
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        total = self.ranks.total_for_parts
        centred = wide - total(wide.sum(-1, keepdim=True)) / self.width
        variance = total(centred.square().sum(-1, keepdim=True)) / self.width
        normed = (centred * torch.rsqrt(variance + self.eps)).to(x.dtype)
        return normed * weight + bias
