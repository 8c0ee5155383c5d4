"""Attention on a mesh of sequence and heads: heads are exchanged in a row, then the op as ever.

Rank (i, j) of a mesh of R rows and U columns holds block i * U + j of the sequence: the ranks of a
row hold neighbouring shards. Each gives the others of its row their share of the heads and gets the
rows of all (Note [Heads against rows] in heads_op.py). The op then runs over the column with these
rows, whatever its mask, layout and exchange, as if each row of the mesh were one rank; and the
result goes back. What is per head is cut with the heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from nnscaler_ring.core.kernels import WHOLE_OPS
from nnscaler_ring.core.op.checks import check_own_length
from nnscaler_ring.core.op.heads_op import exchange_heads_op, row_seed_op, share_text
from nnscaler_ring.core.op.options import Extras, Options
from nnscaler_ring.core.plan.heads import Heads, head_shares
from nnscaler_ring.core.plan.layout import LAYOUTS
from nnscaler_ring.core.ranks.groups import ALONE, mesh_place

Attend = Callable[[Tensor, Tensor, Tensor, Extras, Options], tuple[Tensor, Tensor]]
"""Attention over the column: (out, softmax_lse)."""


class RowLens(NamedTuple):
    """Tokens of every rank of this rank's row, and of every row; None: of equal shards."""

    mine: list[int]
    units: list[int] | None


def row_lens(name: str, lens: Sequence[int] | None, row: str, column: str, tokens: int) -> RowLens:
    """From the lengths of all blocks of the mesh, in block order.

    Raises:
        ValueError: another number of tokens than this rank passes.
    """
    _, ways, unit, part = mesh_place(row, column)
    if lens is None:
        return RowLens([tokens] * ways, None)
    check_own_length(name, lens, unit * ways + part, tokens)
    starts = range(0, len(lens), ways)
    return RowLens(
        list(lens[unit * ways : (unit + 1) * ways]), [sum(lens[n : n + ways]) for n in starts]
    )


def mesh_attention(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extras: Extras,
    options: Options,
    row: str,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """`attend` on this rank's share of the heads and the rows of its row of the mesh.

    Args:
        extras, options: of the whole call: all heads, the lengths of all blocks of the mesh.
        row: the group string of the row; `options.group` is the column's.

    Returns:
        (out, softmax_lse), the latter None unless it is asked for.
    """
    op = options.op
    _, ways, unit, part = mesh_place(row, options.group)
    lens = row_lens("shard_lens", options.shard_lens, row, options.group, q.shape[-3])
    if options.shard_lens is not None and options.shard_lens_k is None:
        if k.shape[-3] != q.shape[-3]:
            raise ValueError(
                "shard_lens_k must be given with shard_lens on a mesh where keys have other "
                f"lengths than queries, got None for {k.shape[-3]} keys and {q.shape[-3]} queries."
            )
        lens_k = RowLens(lens.mine, None)
    else:
        lens_k = row_lens("shard_lens_k", options.shard_lens_k, row, options.group, k.shape[-3])
    shares = head_shares(q.shape[-2], k.shape[-2], ways)
    mine = shares[part]

    def move(
        x: Tensor, heads: Sequence[Heads], mine: Sequence[int], dims: tuple[int, int]
    ) -> Tensor:
        row_dim, head_dim = (dim % x.dim() for dim in dims)
        text, share = share_text(heads), len(heads[part])
        lens = list(mine)
        return exchange_heads_op(x, row_dim, head_dim, op, row, text, lens, False, sum(lens), share)

    of_q, of_kv = [share.q for share in shares], [share.kv for share in shares]
    bias, slopes, sinks, seed = extras.bias, extras.alibi_slopes, extras.sinks, extras.dropout_seed
    first, last = mine.q[0], mine.q[-1] + 1
    if bias is not None:
        of_bias = of_q if bias.shape[-3] > 1 else [(0,)] * ways
        bias = move(bias, of_bias, lens.mine, (-2, -3))
    if seed is not None:
        seed = row_seed_op(seed, op, row, options.same_seed)
    tokens = sum(lens.mine)
    units = lens.units
    computed = tokens
    if units is not None:
        computed = LAYOUTS[options.compute_layout].for_shards(units).shard_lens[unit]
    out, softmax_lse = attend(
        move(q, of_q, lens.mine, (-3, -2)),
        move(k, of_kv, lens_k.mine, (-3, -2)),
        move(v, of_kv, lens_k.mine, (-3, -2)),
        extras._replace(
            bias=bias,
            alibi_slopes=None if slopes is None else slopes[..., first:last],
            sinks=None if sinks is None else sinks[first:last],
            dropout_seed=seed,
        ),
        options._replace(
            shard_lens=units,
            shard_lens_k=lens_k.units,
            compute_len=computed,
            first_head=options.first_head + first,
        ),
    )

    def back(x: Tensor, dims: tuple[int, int]) -> Tensor:
        row_dim, head_dim = (dim % x.dim() for dim in dims)
        sizes = lens.mine[part], q.shape[-2]
        return exchange_heads_op(
            x, row_dim, head_dim, op, row, share_text(of_q), lens.mine, True, *sizes
        )

    return back(out, (-3, -2)), back(softmax_lse, (-1, -2)) if return_lse else None


def check_mesh(num_heads: int, kernel: str, row: str) -> None:
    """The ranks of a row share the query heads evenly, and the kernel is one of tiles.

    Raises:
        ValueError: they cannot, or it is not.
    """
    if row == ALONE:
        return
    if kernel in WHOLE_OPS:
        raise ValueError(
            f"kernel={kernel!r} takes no mesh of sequence and heads; pass "
            "one dimension, or use kernel='auto'."
        )
    _, ways, _, _ = mesh_place(row, ALONE)
    if num_heads % ways:
        raise ValueError(
            f"process_group must have a mesh whose second dimension, {ways} ranks that share the "
            f"heads, divides the query heads, got num_heads={num_heads}; take another number of "
            "columns."
        )
