"""The merge of online_softmax.py as one Triton kernel. Not yet run on a GPU, but interpreted.

Each element of a block is read once and each element of the sum read and written once, in whatever
strides they have. Nothing waits for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 4096
"""Of one program: so many rows that their channels are about as many."""


def fused_merge_(out: Tensor, softmax_lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """As `merge_` in online_softmax.py."""
    batch, rows, num_heads, head_dim = out.shape
    if not out.numel():
        return
    channels = triton.next_power_of_2(head_dim)
    rows_at_once = max(1, ELEMENTS // channels)
    grid = triton.cdiv(rows, rows_at_once), num_heads, batch
    with torch.cuda.device_of(out):
        _merge[grid](
            out,
            softmax_lse,
            block_out,
            block_lse,
            rows,
            head_dim,
            *out.stride(),
            *softmax_lse.stride(),
            *block_out.stride(),
            *block_lse.stride(),
            ROWS=rows_at_once,
            CHANNELS=channels,
        )


def try_out(device_type: str) -> None:
    """Merge one element: raises what Triton does where it cannot compile, as without a compiler."""
    out, lse = torch.zeros(1, 1, 1, 1, device=device_type), torch.zeros(1, 1, 1, device=device_type)
    fused_merge_(out, lse, out.clone(), lse.clone())


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    out,
    lse,
    block_out,
    block_lse,
    rows,
    head_dim,
    out_batch,
    out_row,
    out_head,
    out_channel,
    lse_batch,
    lse_head,
    lse_row,
    block_batch,
    block_row,
    block_head,
    block_channel,
    block_lse_batch,
    block_lse_head,
    block_lse_row,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    # 64 bits: tensors of a long sequence have more than 2**31 elements.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, CHANNELS)
    is_row = row < rows

    lse += batch * lse_batch + head * lse_head + row * lse_row
    block_lse += batch * block_lse_batch + head * block_lse_head + row * block_lse_row
    old = tl.load(lse, mask=is_row, other=0.0)
    new = tl.load(block_lse, mask=is_row, other=0.0).to(old.dtype)
    # Shares of the larger of the two, so that nothing overflows; of 0 where both are -inf.
    top = tl.maximum(old, new)
    seen = top > -float("inf")
    top = tl.where(seen, top, 0.0)
    old_share, new_share = tl.exp(old - top), tl.exp(new - top)
    total = tl.where(seen, old_share + new_share, 1.0)
    tl.store(lse, tl.where(seen, top + tl.log(total), -float("inf")), mask=is_row)
    weight = (new_share / total)[:, None]

    out += batch * out_batch + head * out_head
    out += row[:, None] * out_row + channel[None, :] * out_channel
    block_out += batch * block_batch + head * block_head
    block_out += row[:, None] * block_row + channel[None, :] * block_channel
    is_element = is_row[:, None] & (channel[None, :] < head_dim)
    before = tl.load(out, mask=is_element, other=0.0)
    block = tl.load(block_out, mask=is_element, other=0.0).to(before.dtype)
    tl.store(out, before + weight * (block - before), mask=is_element)
