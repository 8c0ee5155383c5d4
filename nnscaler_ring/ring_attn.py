"""`wrap_ring_attn_func`: exact attention over contiguous shards of a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from nnscaler_ring.core.op.attention import context_parallel_attention

if TYPE_CHECKING:
    from nnscaler_ring.core.plan.masks import Mask
    from nnscaler_ring.core.ranks.groups import ProcessGroupLike
    from nnscaler_ring.core.scores.dropout import DropoutSeed


def wrap_ring_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    process_group: ProcessGroupLike | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout_seed: int | DropoutSeed | None = None,
    return_lse: bool = False,
    shard_lens: Sequence[int] | None = None,
    exchange: str = "direct",
    kernel: str = "auto",
    mask: Mask | str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention over a sequence whose contiguous shards lie on the ranks of a group.

    Rank i of the group passes and gets block i of the sequence. Nobody ever holds the whole
    sequence: memory per rank is O(tokens / ranks) with the direct and the ring exchange. Causal
    work is not balanced over contiguous shards; `wrap_zigzag_attn_func` balances it.

    Args:
        q: [batch, tokens, num_heads, head_dim], this rank's tokens; float64, float32, bfloat16 or
            float16.
        k: [batch, tokens, num_kv_heads, head_dim]; num_kv_heads divides num_heads.
        v: [batch, tokens, num_kv_heads, v_head_dim].
        softmax_scale: multiplies the scores; None is 1 / sqrt(head_dim).
        dropout_p: probability of dropping a probability; what is kept is scaled by 1 / (1 - p),
            softmax_lse stays. The mask depends on the seed and on global positions alone: the same
            for every number of ranks, layout and exchange.
        causal: a query sees no later key: the right window is at most 0.
        window_size: (left, right) in tokens: query i sees keys i - left to i + right; -1 is
            unbounded.
        alibi_slopes: [num_heads] or [batch, num_heads]: scores get `-slope * |i - j|` of global
            positions. Constants: no gradient.
        deterministic: the same bits in every run on the same machine and number of ranks; refused
            by kernels that cannot.
        return_attn_probs: refused; use `return_lse`.
        process_group: None (q, k, v are the whole sequence), global ranks in block order, a
            ProcessGroup, or a DeviceMesh of one dimension, or of two, (sequence, heads): heads are
            then exchanged within a row, whose ranks hold neighbouring shards.
        bias: [batch or 1, num_heads or 1, tokens, tokens of all ranks]: added to the scores. Rows
            are this rank's, in its layout; columns are the keys in global order. Has a gradient.
        softcap: scores become `softcap * tanh(scores / softcap)` before bias and ALiBi; 0.0 is
            none.
        sinks: [num_heads], one more logit per head in the denominator, counted in softmax_lse. Has
            a gradient.
        dropout_seed: int, the same on all ranks; None: drawn from torch's CPU generator of the
            group's first rank. Ranks that hold parts of the batch or heads: a `DropoutSeed`.
        return_lse: also return the softmax normaliser; it has gradients.
        shard_lens: tokens of every block, in block order, where they differ; empty ones are
            allowed. None: all equal.
        exchange: "direct" (each rank sends every other just the rows it reads), "gathered" (the
            same rows from all ranks at once, in a few stages), "ring" (neighbour to neighbour) or
            "all_gather" (everything to everybody, memory O(tokens)).
        kernel: "auto", or a name in `nnscaler_ring.core.kernels.KERNELS`; "transformer_engine"
            hands the whole call to that package.
        mask: a mask from `nnscaler_ring.masks` (chunks, a prefix, rectangles, combinations), or its
            text; instead of causal and window_size, which are then left out.

    Returns:
        out [batch, tokens, num_heads, v_head_dim] in q's dtype; with `return_lse` also softmax_lse
        [batch, num_heads, tokens], natural log, float32 (float64 for float64). A row that sees no
        key has out 0, softmax_lse -inf (the sink's logit) and zero gradients.

        Of bias and sinks, which every rank may hold, a rank gets its part of the gradient: the sum
        over the group is the whole.

    Raises:
        ValueError, TypeError: a wrong argument, on this or on another rank of the group, or ranks
            that disagree; before any data moves.
        NotImplementedError: return_attn_probs=True.
        RuntimeError: a rank was lost; the message names the op and the peer.

    Source: Liu et al., "Ring Attention with Blockwise Transformers", arXiv 2310.01889.
    """
    return context_parallel_attention(
        "wrap_ring_attn_func",
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        mask=mask,
        process_group=process_group,
        return_lse=return_lse,
        shard_lens=shard_lens,
        exchange=exchange,
        kernel=kernel,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        dropout_p=dropout_p,
        alibi_slopes=alibi_slopes,
        bias=bias,
        softcap=softcap,
        sinks=sinks,
        dropout_seed=dropout_seed,
    )
