"""Head dims as fused kernels want them, and the gradient of the lse that they do not know.

Note [A gradient through the lse in a kernel that knows none]
    The gradient dlse of a row's softmax_lse adds `probability * dlse` to every score's gradient.
    Columns of ones in v and of dlse in dout do that: `dout . v` grows by dlse for every key. The
    same columns of out are 0, so the row sum `dout . out` stays, and dv's columns are dropped. In
    half precision dlse is the sum of two columns, its rounding and what that left over.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nnscaler_ring.core.sums.online_softmax import accumulation_dtype

ALIGNMENT = 16
"""Bytes that a fused CUDA kernel loads at a time."""


def to_head_dim(head_dim: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """All with so many channels, padded with zeros, and dense in the last dim.

    Zeros in q, k, v, out and dout change no score and no other channel.
    """
    return tuple(
        F.pad(x, (0, head_dim - x.shape[-1]))
        if x.shape[-1] < head_dim
        else (x if x.stride(-1) == 1 else x.contiguous())
        for x in tensors
    )


def aligned(x: Tensor) -> Tensor:
    """The tensor, copied if a row or a head of it does not start at a multiple of 16 bytes.

    Fused CUDA kernels read so much at a time. A view may start elsewhere, as do values that are
    packed behind keys of an odd head dim. Expanded tensors are copied, too: cuDNN knows no stride
    of 0.
    """
    size = x.element_size()
    steps = [s * size for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    if x.data_ptr() % ALIGNMENT == 0 and all(step and step % ALIGNMENT == 0 for step in steps):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def round_up(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


def lse_columns(dtype: torch.dtype) -> int:
    """How many columns carry a dlse in this dtype."""
    return 1 if dtype == accumulation_dtype(dtype) else 2


def with_lse_columns(
    dout: Tensor, v: Tensor, out: Tensor, dlse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dout, v, out) whose plain backward is that of dout [b, n, h, dv] and dlse [b, h, n]."""
    # Note [A gradient through the lse in a kernel that knows none].
    count = lse_columns(dout.dtype)
    rest = dlse.transpose(1, 2).unsqueeze(-1)
    columns = []
    for _ in range(count):
        columns.append(rest.to(dout.dtype))
        rest = rest - columns[-1]
    dout = torch.cat([dout, *columns], dim=-1)
    return dout, F.pad(v, (0, count), value=1.0), F.pad(out, (0, count))
