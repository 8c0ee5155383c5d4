"""THE forward and THE backward of context-parallel attention.

The case analysis of the mask is data (the tiles of the schedule), so both passes are one loop over
the steps of an exchange and the kernel calls of a step. Partial results stay in float32 until
the end.

Note [Global out and softmax_lse]
    A tile's backward gets the merged out and softmax_lse of its query rows, not the tile's own.
    Then `exp(scores - softmax_lse)` is the tile's part of the whole softmax and its gradients are
    exact: the sum over tiles is the gradient, with nothing to correct afterwards. Sinks are one
    more block of keys for the forward pass; in the backward they need their own gradient alone.

Source: Liu et al., "Ring Attention with Blockwise Transformers", arXiv 2310.01889; Dao,
"FlashAttention-2", arXiv 2307.08691.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from nnscaler_ring.core.exchange import KVExchange
from nnscaler_ring.core.kernels import AttentionKernel, BackwardTensors
from nnscaler_ring.core.kernels.scale_sign import for_scale
from nnscaler_ring.core.scores.scores import Scores
from nnscaler_ring.core.sums.online_softmax import PartialOutput
from nnscaler_ring.core.sums.row_sum import RowSum
from nnscaler_ring.core.sums.sinks import merge_sinks_, sink_gradient


class Gradients(NamedTuple):
    """Of this rank's rows; `dbias` and `dsinks` where there are a bias that wants one, and sinks.

    `dsinks` is this rank's part: the sum over ranks is the gradient.
    """

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None
    dsinks: Tensor | None


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    exchange: KVExchange,
    kernel: AttentionKernel,
    scores: Scores,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries to everybody's keys.

    Args:
        q: [batch, shard_len, num_heads, head_dim].
        k: [batch, shard_len_k, num_kv_heads, head_dim]; v likewise with v_head_dim.
        sinks: [num_heads].

    Returns:
        out in q's dtype, softmax_lse [batch, num_heads, shard_len].
    """
    partial = partial_attention(q, k, v, exchange=exchange, kernel=kernel, scores=scores)
    if sinks is not None:
        merge_sinks_(partial, q, v.shape[-1], sinks)
    out, softmax_lse = partial.current()
    return out.to(q.dtype).contiguous(), softmax_lse.contiguous()


def partial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    exchange: KVExchange,
    kernel: AttentionKernel,
    scores: Scores,
) -> PartialOutput:
    """`attention_forward` before it is rounded, for callers that merge it with more keys."""
    partial = PartialOutput(q, v.shape[-1])
    kernel = for_scale(kernel, scores.softmax_scale)
    for step in exchange.steps(k, v):
        step_scores = scores.of_keys(step.rows, q.device)
        for call in kernel.calls(step.tiles, plain=scores.plain):
            block_out, block_lse = kernel.forward(
                q[:, call.q],
                step.k[:, call.k],
                step.v[:, call.k],
                step_scores.of(call),
            )
            partial.merge_(call.q, block_out, block_lse)
        del step  # its memory is needed for the next one
    return partial


def attention_backward(
    tensors: BackwardTensors,
    *,
    exchange: KVExchange,
    kernel: AttentionKernel,
    scores: Scores,
    sinks: Tensor | None = None,
) -> Gradients:
    """Gradients from those of out and of softmax_lse. See Note [Global out and softmax_lse]."""
    dq, dk, dv = gradient_sums(tensors, exchange=exchange, kernel=kernel, scores=scores)
    dout, dlse, q, k, v, out, softmax_lse = tensors
    return Gradients(
        dq.to(q.dtype).contiguous(),
        dk.to(k.dtype).contiguous(),
        dv.to(v.dtype).contiguous(),
        scores.dbias(),
        None if sinks is None else sink_gradient(dout, out, softmax_lse, dlse, sinks),
    )


def gradient_sums(
    tensors: BackwardTensors, *, exchange: KVExchange, kernel: AttentionKernel, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `attention_backward` before they are rounded."""
    dq = RowSum(tensors.q)
    kernel = for_scale(kernel, scores.softmax_scale)
    for step in exchange.gradient_steps(tensors.k, tensors.v):
        step_scores = scores.of_keys(step.rows, tensors.q.device)
        for call in kernel.calls(step.tiles, plain=scores.plain):
            block = kernel.backward(tensors.of_call(call, step.k, step.v), step_scores.of(call))
            dq.take_(call.q, block.dq)
            step.dk.take_(call.k, block.dk)
            step.dv.take_(call.k, block.dv)
            step_scores.take_dbias_(call, block.dbias)
            del block
        del step  # its memory is needed for the next one
    return dq.current(), *exchange.gradients()
