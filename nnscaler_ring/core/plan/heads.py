"""Which heads a rank computes where the ranks of a mesh's row share them. No torch."""

from __future__ import annotations

from typing import NamedTuple

Heads = tuple[int, ...]
"""Numbers of heads among all heads, in the order in which a rank holds them; some may repeat."""


class HeadShare(NamedTuple):
    """The query heads that one rank computes, neighbours, and the KV heads that it reads for them.

    As in any call, each of the KV heads serves as many query heads, in order.
    """

    q: Heads
    kv: Heads


def head_shares(num_heads: int, num_kv_heads: int, ways: int) -> tuple[HeadShare, ...]:
    """The share of every rank of a row of `ways` ranks; `ways` must divide `num_heads`.

    A KV head goes to all ranks that hold query heads of it. Where a rank's query heads straddle KV
    heads unevenly (12 query heads, 3 KV heads, 4 ranks), it holds one KV head per query head.
    """
    assert num_heads % ways == 0, (num_heads, ways)
    per_rank, per_kv_head = num_heads // ways, num_heads // num_kv_heads
    shares = []
    for rank in range(ways):
        q = tuple(range(rank * per_rank, (rank + 1) * per_rank))
        read = [head // per_kv_head for head in q]
        distinct = sorted(set(read))
        evenly = all(read.count(head) == read.count(distinct[0]) for head in distinct)
        shares.append(HeadShare(q, tuple(distinct if evenly else read)))
    return tuple(shares)
