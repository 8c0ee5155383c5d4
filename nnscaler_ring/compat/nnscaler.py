"""The ops of nnScaler 0.9's `nnscaler.customized_ops.ring_attention`: names, parameters, positions.

    from nnscaler_ring.compat.nnscaler import wrap_ring_attn_varlen_func   # the only line to change

Needs neither flash-attn nor a GPU. Every argument is honoured or refused by name; what differs is
in docs/nnscaler.md. The dense ops have the same parameters here and there, and are ours.

Note [Arguments of nnScaler's packed ops]
    enable_ring: False computes on this rank alone, whatever process_group says; a plan that
        partitions the tokens of such a call is refused.
    use_cute: True asks for FlashAttention 4, `kernel="flash_attn_4"`.
    max_seqlen_q, max_seqlen_k: checked to be lengths, and not needed: cu_seqlens has them.
    process_group: None in a model; nnScaler's plan gives it.
    dropout_seed: not nnScaler's; as in `nnscaler_ring.wrap_ring_attn_varlen_func`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nnscaler_ring import ring_attn_varlen
from nnscaler_ring.compat.shuffle_op import shuffle_documents_op
from nnscaler_ring.core.ranks.agreement import refusing_together
from nnscaler_ring.core.ranks.groups import find_place, group_string
from nnscaler_ring.ring_attn import wrap_ring_attn_func
from nnscaler_ring.zigzag_attn import wrap_zigzag_attn_func

if TYPE_CHECKING:
    from nnscaler_ring.core.ranks.groups import ProcessGroupLike
    from nnscaler_ring.core.scores.dropout import DropoutSeed

__all__ = [
    "wrap_maybe_shuffle",
    "wrap_maybe_unshuffle",
    "wrap_ring_attn_func",
    "wrap_ring_attn_varlen_func",
    "wrap_sliding_window_attn_func",
    "wrap_zigzag_allgather_attn_varlen_func",
    "wrap_zigzag_attn_func",
]


def wrap_ring_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
    return_attn_probs: bool = False,
    enable_ring: bool = True,
    use_cute: bool = False,
    process_group: ProcessGroupLike | None = None,
    return_lse: bool = False,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    dropout_seed: int | DropoutSeed | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`nnscaler_ring.wrap_ring_attn_varlen_func` with the parameters of nnScaler's own op.

    Args:
        q: [tokens, num_heads, head_dim]; k and v with num_kv_heads; a contiguous shard of each.
        alibi_slopes: [num_heads] or None; sixth by position.
        enable_ring, use_cute, max_seqlen_q, max_seqlen_k: Note [Arguments of nnScaler's packed ops]
    """
    group = process_group if enable_ring else None
    with refusing_together(group_string(group), "wrap_ring_attn_varlen_func"):
        _check_maxima(max_seqlen_q, max_seqlen_k)
    return ring_attn_varlen.wrap_ring_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        process_group=group,
        return_lse=return_lse,
        dropout_seed=dropout_seed,
        kernel="flash_attn_4" if use_cute else "auto",
    )


def wrap_sliding_window_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
    return_attn_probs: bool = False,
    enable_ring: bool = True,
    use_cute: bool = False,
    process_group: ProcessGroupLike | None = None,
    return_lse: bool = False,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    dropout_seed: int | DropoutSeed | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `wrap_ring_attn_varlen_func`, causal by default; any window, of any number of shards.

    Only the keys inside the window travel, which they do in every op here.
    """
    return wrap_ring_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        alibi_slopes,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        deterministic,
        return_attn_probs,
        enable_ring,
        use_cute,
        process_group,
        return_lse,
        max_seqlen_q,
        max_seqlen_k,
        dropout_seed=dropout_seed,
    )


def wrap_zigzag_allgather_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
    return_attn_probs: bool = False,
    enable_ring: bool = True,
    use_cute: bool = False,
    process_group: ProcessGroupLike | None = None,
    return_lse: bool = False,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    dropout_seed: int | DropoutSeed | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of this rank's queries in zigzag order to all keys, which every rank holds.

    Of each document a rank holds query chunks r and 2N-1-r of 2N, as `wrap_maybe_shuffle` gives
    them; k and v are whole and in their own order. Nothing travels: each rank has its part of dk
    and dv. `wrap_ring_attn_varlen_func` needs neither the shuffle nor all keys.

    Args:
        q: [tokens / N, num_heads, head_dim], this rank's rows of the packed queries.
        k: [key tokens, num_kv_heads, head_dim], all of them; v likewise.
        cu_seqlens_q, cu_seqlens_k: global; query documents must divide by 2N.

    Raises:
        ValueError: on several ranks, dropout, or a window or slopes without causal.
    """
    op = "wrap_zigzag_allgather_attn_varlen_func"
    group = group_string(process_group if enable_ring else None)
    place = find_place(group)
    with refusing_together(group, op):
        _check_maxima(max_seqlen_q, max_seqlen_k)
        if place.world_size > 1:
            _check_zigzag_allgather(causal, window_size, alibi_slopes, dropout_p)
            slices = _slices_of(cu_seqlens_q, len(q), place.world_size)
    kernel = "flash_attn_4" if use_cute else "auto"
    options = {
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window_size,
        "alibi_slopes": alibi_slopes,
        "deterministic": deterministic,
        "return_attn_probs": return_attn_probs,
        "kernel": kernel,
    }
    if place.world_size == 1:
        return ring_attn_varlen.wrap_ring_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
            return_lse=return_lse,
            **options,  # type: ignore[arg-type]
        )
    # Chunk c of a document of 2N sees the keys up to its own end: as many less as chunks follow.
    halves = _halves(slices)
    results = []
    for rows, chunk in zip(
        halves, (place.block, 2 * place.world_size - 1 - place.block), strict=True
    ):
        following = 2 * place.world_size - 1 - chunk
        hidden = slices * following if causal else torch.zeros_like(slices)
        lens_k = cu_seqlens_k.cpu().long().diff()
        results.append(
            ring_attn_varlen.wrap_ring_attn_varlen_func(
                q[rows],
                k,
                v,
                _bounds(slices, torch.zeros_like(slices)),
                _bounds(lens_k - hidden, hidden),
                return_lse=True,
                **options,  # type: ignore[arg-type]
            )
        )
    order = torch.cat(halves).argsort()
    out = torch.cat([out for out, _ in results])[order]
    softmax_lse = torch.cat([lse for _, lse in results], dim=-1)[..., order]
    return (out, softmax_lse) if return_lse else out


def wrap_maybe_shuffle(
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    enable_ring: bool = True,
    process_group: ProcessGroupLike | None = None,
) -> Tensor:
    """This rank's contiguous rows in, its two zigzag chunks of every document out.

    Without a group, or with `enable_ring=False`, the rows stay as they are. Has gradients.

    Args:
        hidden_states: [tokens, ...], the tokens of all ranks being those of cu_seqlens.
        cu_seqlens: [documents + 1], global; every document must divide by twice the ranks.
    """
    return _shuffle(
        "wrap_maybe_shuffle", hidden_states, cu_seqlens, enable_ring, process_group, back=False
    )


def wrap_maybe_unshuffle(
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    enable_ring: bool = True,
    process_group: ProcessGroupLike | None = None,
) -> Tensor:
    """The inverse of `wrap_maybe_shuffle`."""
    return _shuffle(
        "wrap_maybe_unshuffle", hidden_states, cu_seqlens, enable_ring, process_group, back=True
    )


def _shuffle(
    op: str,
    x: Tensor,
    cu_seqlens: Tensor,
    enable_ring: bool,
    process_group: ProcessGroupLike | None,
    *,
    back: bool,
) -> Tensor:
    group = group_string(process_group if enable_ring else None)
    if find_place(group).world_size == 1:
        return x
    shuffled: Tensor
    shuffled, _ = shuffle_documents_op(x, cu_seqlens, None, op, group, back)
    return shuffled


def _check_maxima(max_seqlen_q: object, max_seqlen_k: object) -> None:
    for name, value in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(
                f"{name} must be None or an int >= 0, got {value!r}; leave it out: cu_seqlens has "
                "all lengths."
            )


def _check_zigzag_allgather(
    causal: bool, window_size: tuple[int, int], alibi_slopes: Tensor | None, dropout_p: float
) -> None:
    remedy = "call wrap_ring_attn_varlen_func, which takes contiguous shards"
    if dropout_p:
        raise ValueError(
            f"dropout_p must be 0 with queries in zigzag order, got {dropout_p}: the chunks would "
            f"drop by positions of their own; {remedy}."
        )
    if not causal and (tuple(window_size) != (-1, -1) or alibi_slopes is not None):
        raise ValueError(
            "window_size must be (-1, -1) and alibi_slopes None without causal, with queries in "
            f"zigzag order, got window_size={window_size}; {remedy}."
        )


def _slices_of(cu_seqlens_q: Tensor, rows: int, ranks: int) -> Tensor:
    """Tokens of each document's chunks, int64 on the CPU."""
    lens = cu_seqlens_q.cpu().long().diff()
    if (lens % (2 * ranks)).any() or int(lens.sum()) != rows * ranks:
        raise ValueError(
            f"cu_seqlens_q must give documents that divide by {2 * ranks}, twice the ranks, and "
            f"{rows * ranks} tokens in all, got lengths {lens.tolist()}; pad them, or call "
            "wrap_ring_attn_varlen_func."
        )
    return lens // (2 * ranks)


def _halves(slices: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the first and of the second chunk of every document."""
    first = torch.arange(2 * len(slices)) % 2 == 0
    first = first.repeat_interleave(slices.repeat_interleave(2))
    return first.nonzero().flatten(), (~first).nonzero().flatten()


def _bounds(seen: Tensor, unseen: Tensor) -> Tensor:
    """cu_seqlens of documents that are each followed by another."""
    lens: Sequence[Tensor] = (seen, unseen)
    return torch.nn.functional.pad(
        torch.stack(tuple(lens), dim=1).flatten().cumsum(0), (1, 0)
    ).int()
