"""Masks for tests: random ones of every kind, and what they mean, written out once more.

`shown` has nothing in common with the code under test for the kinds that it knows; a kind that it
does not know yet is taken at its own word, `Mask.sees`.
"""

import random

import torch
from torch import Tensor

from nnscaler_ring.core.plan.masks import KINDS, Mask, mask_of
from nnscaler_ring.core.plan.masks.combined import Both, Either
from nnscaler_ring.masks import Chunks, Documents, Prefix, Rectangles, Window


def shown(mask: Mask, query: Tensor, key: Tensor, document: int = 0) -> Tensor:
    """Which of the query positions [n, 1] sees which of the key positions [1, m]: bool [n, m]."""
    query, key = torch.broadcast_tensors(query, key)
    if isinstance(mask, Both):
        return shown(mask.first, query, key, document) & shown(mask.second, query, key, document)
    if isinstance(mask, Either):
        return shown(mask.first, query, key, document) | shown(mask.second, query, key, document)
    if isinstance(mask, Window):
        ahead = key - query
        return (ahead <= mask.right) & (-ahead <= mask.left)
    if isinstance(mask, Chunks):
        first = torch.div(query, mask.size, rounding_mode="floor") * mask.size
        return (first <= key) & (key <= query)
    if isinstance(mask, Prefix):
        length = mask.length if isinstance(mask.length, int) else mask.length[document]
        return torch.where(query < length, key < length, key <= query)
    seen = torch.zeros(query.shape, dtype=torch.bool)
    if isinstance(mask, Documents):
        for number, start in enumerate(mask.cu_seqlens[:-1]):
            stop = mask.cu_seqlens[number + 1]
            mine = [(x >= start) & (x < stop) for x in (query, key)]
            seen |= mine[0] & mine[1] & shown(mask.mask, query - start, key - start, number)
        return seen
    if isinstance(mask, Rectangles):
        for q_start, q_stop, k_start, k_stop, band in mask.rectangles:
            i, j = query - q_start, key - k_start
            rows, columns = q_stop - q_start, k_stop - k_start
            inside = (i >= 0) & (i < rows) & (j >= 0) & (j < columns)
            if band in ("causal", "bi_causal"):
                inside &= j <= i + columns - rows
            if band in ("inverse_causal", "bi_causal"):
                inside &= j >= i
            seen |= inside
        return seen
    pairs = zip(query.flatten().tolist(), key.flatten().tolist(), strict=True)
    at_its_word = [bool(mask.sees(*pair, document)) for pair in pairs]
    return torch.tensor(at_its_word, dtype=torch.bool).view(query.shape)


def random_mask(rng: random.Random, positions: int, *, packed: bool = False) -> Mask:
    """A mask of any kind for a sequence, or for packed documents of any lengths."""
    kinds = ["Window", "Chunks", "Prefix"]
    kinds += [] if packed else ["Rectangles", "Documents"]
    kind = rng.choice((*kinds, "Both", "Either"))
    if kind == "Window":
        sides = {side: rng.randint(0, 9) for side in ("left", "right") if rng.random() < 0.6}
        return Window(**sides)
    if kind == "Chunks":
        return Chunks(rng.choice((1, 2, 3, 5, 8, 100)))
    if kind == "Prefix":
        return Prefix(rng.choice((0, 1, 4, 9, 100)))
    if kind == "Rectangles":
        return Rectangles([_rectangle(rng, positions) for _ in range(rng.randint(0, 4))])
    if kind == "Documents":
        cuts = sorted(rng.randint(0, positions) for _ in range(rng.randint(0, 3)))
        return Documents([0, *cuts, positions], random_mask(rng, positions, packed=True))
    first, second = (random_mask(rng, positions, packed=packed) for _ in range(2))
    return first & second if kind == "Both" else first | second


def _rectangle(rng: random.Random, positions: int) -> tuple[int, int, int, int, str]:
    q_start, q_stop = sorted(rng.randint(0, positions) for _ in range(2))
    k_start, k_stop = sorted(rng.randint(0, positions) for _ in range(2))
    band = rng.choice(("full", "causal", "inverse_causal", "bi_causal"))
    return q_start, q_stop, k_start, k_stop, band


def examples() -> list[Mask]:
    """Those that every kind gives of itself."""
    return [mask_of(text) for kind in KINDS.values() for text in kind.examples]
