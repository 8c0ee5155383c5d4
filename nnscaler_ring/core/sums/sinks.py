"""Attention sinks: one more logit per head in the denominator of the softmax, without a value.

Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453;
learnable and per head as in OpenAI's gpt-oss model card, arXiv 2508.10925.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnscaler_ring.core.sums.online_softmax import PartialOutput


def merge_sinks_(partial: PartialOutput, q: Tensor, v_head_dim: int, sinks: Tensor) -> None:
    """The sinks as one more block of keys, whose values are 0; sinks [num_heads]."""
    batch, rows, num_heads, _ = q.shape
    dtype = partial.dtype
    nothing = q.new_zeros((), dtype=dtype).expand(batch, rows, num_heads, v_head_dim)
    logits = sinks.to(dtype).view(1, num_heads, 1).repeat(batch, 1, rows)
    partial.merge_(slice(0, rows), nothing, logits)


def sink_gradient(
    dout: Tensor, out: Tensor, softmax_lse: Tensor, dlse: Tensor | None, sinks: Tensor
) -> Tensor:
    """This rank's part of the gradient of sinks, from the global out and softmax_lse."""
    dtype = softmax_lse.dtype
    delta = torch.linalg.vecdot(dout.to(dtype), out.to(dtype)).transpose(1, 2)
    if dlse is not None:
        delta = delta - dlse
    # -inf is a sink that is not there; with no visible key either, the lse is -inf too.
    distance = sinks.to(dtype).view(1, -1, 1) - softmax_lse
    probability = distance.masked_fill(softmax_lse == -torch.inf, -torch.inf).exp()
    return -(probability * delta).sum((0, 2)).to(sinks.dtype)
