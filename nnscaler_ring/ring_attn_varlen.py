"""`wrap_ring_attn_varlen_func`: exact attention over packed documents, sharded anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from nnscaler_ring.core.op.attention import context_parallel_attention

if TYPE_CHECKING:
    from nnscaler_ring.core.plan.masks import Mask
    from nnscaler_ring.core.ranks.groups import ProcessGroupLike
    from nnscaler_ring.core.scores.dropout import DropoutSeed

LAYOUTS_OF_VARLEN = {
    "contiguous": ("contiguous", "contiguous"),
    "folded": ("folded", "folded"),
    "contiguous, folded": ("contiguous", "folded"),
}
"""`layout`: the layouts, of `LAYOUTS`, in which the caller holds the rows and they are computed."""


def wrap_ring_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    process_group: ProcessGroupLike | None = None,
    *,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout_seed: int | DropoutSeed | None = None,
    return_lse: bool = False,
    shard_lens: Sequence[int] | None = None,
    shard_lens_k: Sequence[int] | None = None,
    exchange: str = "direct",
    kernel: str = "auto",
    layout: str = "contiguous",
    mask: Mask | str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention within documents that are packed one after another over all ranks.

    Rank i of the group passes and gets the i-th contiguous block of the packed tokens, unless
    `layout` says otherwise; documents end where they end: no padding, no divisibility, and nothing
    travels across a document's end. Arguments that are not listed here are those of
    `wrap_ring_attn_func`.

    Args:
        q: [tokens, num_heads, head_dim], this rank's packed query tokens.
        k: [tokens_k, num_kv_heads, head_dim]; v: [tokens_k, num_kv_heads, v_head_dim].
        cu_seqlens_q: [documents + 1], int32 or int64, global (the same on every rank): starts at 0,
            never falls, ends at the query tokens of all ranks. Documents may be empty. Best kept on
            the CPU: a tensor on a device is copied once per new tensor.
        cu_seqlens_k: likewise for the keys, as many documents. Causal masks and windows are
            bottom-right aligned per document: query i sees key j iff j <= i + Lk - Lq.
        bias: [num_heads or 1, tokens, key tokens of all ranks]; alibi_slopes: [num_heads], on the
            positions `|i + Lk - Lq - j|` within a document.
        shard_lens: query tokens of every block where they differ.
        shard_lens_k: key tokens of every block; None: as the queries' if the totals are equal, else
            all equal.
        mask: as in `wrap_ring_attn_func`; positions count in each document, where the last query
            stands at the last key's.
        layout: who holds and computes which rows. "contiguous": contiguous shards; a rank's work
            is as its documents fall. "folded": every rank computes as many tokens and, when causal,
            as many pairs as any other, and passes and gets the rows that `packed_rows` names; see
            `FoldedDocuments`. "contiguous, folded": the caller holds contiguous shards, and the op
            moves the rows there and back; cu_seqlens_q and cu_seqlens_k must then be the same.

    Returns:
        out [tokens, num_heads, v_head_dim]; with `return_lse` also softmax_lse
        [num_heads, tokens]. A query whose document has no visible key gets 0 and -inf
        (the sink's logit).
    """
    return context_parallel_attention(
        "wrap_ring_attn_varlen_func",
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        mask=mask,
        process_group=process_group,
        return_lse=return_lse,
        shard_lens=shard_lens,
        shard_lens_k=shard_lens_k,
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
        layout=layout,
        layouts=LAYOUTS_OF_VARLEN,
        packed=True,
    )
