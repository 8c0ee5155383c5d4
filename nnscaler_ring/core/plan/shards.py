"""How many tokens each block holds, where nobody says otherwise."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise


@lru_cache(maxsize=64)
def equal_shards(tokens: int, ranks: int) -> tuple[int, ...]:
    """Contiguous shards that differ by one token at most: block i of N holds the tokens
    `[i*T//N, (i+1)*T//N)`."""
    edges = (rank * tokens // ranks for rank in range(ranks + 1))
    return tuple(stop - start for start, stop in pairwise(edges))
