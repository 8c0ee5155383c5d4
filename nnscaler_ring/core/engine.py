"""THE forward and THE backward of context-parallel attention.

The case analysis of the mask is data (the tiles of the schedule), so both passes are one loop over
the steps of an exchange and the tiles of a step. Partial results stay in float32 until the end.

Note [Global out and softmax_lse]
    A tile's backward gets the merged out and softmax_lse of its query rows, not the tile's own.
    Then `exp(scores - softmax_lse)` is the tile's part of the whole softmax and its gradients are
    exact: the sum over tiles is the gradient, with nothing to correct afterwards.

Source: Liu et al., "Ring Attention with Blockwise Transformers", arXiv 2310.01889; Dao,
"FlashAttention-2", arXiv 2307.08691.
"""

from __future__ import annotations

from torch import Tensor

from nnscaler_ring.core.exchange import KVExchange
from nnscaler_ring.core.kernels import AttentionKernel
from nnscaler_ring.core.online_softmax import PartialOutput
from nnscaler_ring.core.row_sum import RowSum


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    exchange: KVExchange,
    kernel: AttentionKernel,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries to everybody's keys.

    Args:
        q: [batch, shard_len, num_heads, head_dim].
        k: [batch, shard_len_k, num_kv_heads, head_dim]; v likewise with v_head_dim.

    Returns:
        out in q's dtype, softmax_lse [batch, num_heads, shard_len].
    """
    partial = PartialOutput(q, v.shape[-1])
    for step in exchange.steps(k, v):
        for tile in kernel.calls(step.tiles):
            block_out, block_lse = kernel.forward(
                q[:, tile.q],
                step.k[:, tile.k],
                step.v[:, tile.k],
                softmax_scale=softmax_scale,
                window=tile.window(),
            )
            partial.merge_(tile.q, block_out, block_lse)
    out, softmax_lse = partial.current()
    return out.to(q.dtype).contiguous(), softmax_lse.contiguous()


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    *,
    exchange: KVExchange,
    kernel: AttentionKernel,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of this rank's rows. See Note [Global out and softmax_lse]."""
    dq = RowSum(q)
    for step in exchange.gradient_steps(k, v):
        for tile in kernel.calls(step.tiles):
            block_dq, block_dk, block_dv = kernel.backward(
                dout[:, tile.q],
                q[:, tile.q],
                step.k[:, tile.k],
                step.v[:, tile.k],
                out[:, tile.q],
                softmax_lse[..., tile.q],
                softmax_scale=softmax_scale,
                window=tile.window(),
            )
            dq.take_(tile.q, block_dq)
            step.dk.take_(tile.k, block_dk)
            step.dv.take_(tile.k, block_dv)
            del block_dq, block_dk, block_dv
        del step  # its memory is needed for the next one
    dk, dv = exchange.gradients()
    return (
        dq.current().to(q.dtype).contiguous(),
        dk.to(k.dtype).contiguous(),
        dv.to(v.dtype).contiguous(),
    )
