"""`wrap_dilated_attn_func`: exact dilated attention (LongNet) over contiguous shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from nnscaler_ring.core.op.attention import dilated_attention

if TYPE_CHECKING:
    from nnscaler_ring.core.plan.dilation import HeadOffsets
    from nnscaler_ring.core.ranks.groups import ProcessGroupLike


def wrap_dilated_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    softmax_scale: float | None = None,
    causal: bool = True,
    head_offsets: str | HeadOffsets = "mod",
    process_group: ProcessGroupLike | None = None,
    *,
    return_lse: bool = False,
    shard_lens: Sequence[int] | None = None,
    exchange: str = "direct",
    kernel: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact dilated attention over a sequence whose contiguous shards lie on the ranks of a group.

    Branch (w, r) cuts the whole sequence into segments of w tokens; within a segment a head of
    offset s uses the tokens at positions s, s + r, s + 2r, ... for queries and keys. Every head
    takes part in every branch. The branches are one softmax over the keys of all of them: a key
    that two branches show a query counts twice. Values and gradients are those of this pattern on
    one device, for any segment length against any shard length, however ragged the last segment.

    Work is O(tokens * w / r) per branch and head. Only used rows of K and V of ranks that share a
    segment travel. Memory per rank is O(tokens / ranks) with the direct and the ring exchange.

    Args:
        q: [batch, tokens, num_heads, head_dim], this rank's tokens; float64, float32, bfloat16 or
            float16.
        k: [batch, tokens, num_kv_heads, head_dim]; num_kv_heads divides num_heads.
        v: [batch, tokens, num_kv_heads, v_head_dim].
        segment_lengths: w of every branch, in tokens of the whole sequence; any order. One branch
            of w >= all tokens and r = 1 is dense attention.
        dilation_rates: r of every branch, at most its w.
        softmax_scale: multiplies the scores; None is 1 / sqrt(head_dim).
        causal: a query sees no later key.
        head_offsets: "mod": KV head j has offset j % r; "block": KV heads in r contiguous blocks of
            ceil(num_kv_heads / r). Ranks that hold a part of the heads: a `HeadOffsets`.
        process_group: None (q, k, v are the whole sequence), global ranks in block order, a
            ProcessGroup, or a one-dimensional DeviceMesh.
        return_lse: also return the softmax normaliser over all branches; it has gradients.
        shard_lens: tokens of every block, in block order, where they differ; empty ones are
            allowed. None: all equal.
        exchange: "direct" (each rank sends every other just the rows it reads), "gathered" (the
            same rows from all ranks at once), "ring" (neighbour to neighbour) or "all_gather".
        kernel: "auto", or a kernel by name.

    Returns:
        out [batch, tokens, num_heads, v_head_dim] in q's dtype, or (out, softmax_lse) with
        softmax_lse [batch, num_heads, tokens] in float32 (float64 for float64). Where no branch
        shows a query any key, out is 0 and softmax_lse -inf: with every r > 1 some tokens are not
        used by some heads.

    Raises:
        ValueError, TypeError: wrong arguments, here or on another rank, before any data moves.
        RuntimeError: another rank is lost; within the group's timeout.

    Source: Ding et al., "LongNet: Scaling Transformers to 1,000,000,000 Tokens", arXiv 2307.02486.
    """
    return dilated_attention(
        "wrap_dilated_attn_func",
        q,
        k,
        v,
        segment_lengths,
        dilation_rates,
        softmax_scale=softmax_scale,
        causal=causal,
        head_offsets=head_offsets,
        process_group=process_group,
        return_lse=return_lse,
        shard_lens=shard_lens,
        exchange=exchange,
        kernel=kernel,
    )
