"""Every kind of mask through the public functions, forward and backward, equals dense float64."""

import itertools
import pickle
import random

import pytest
import torch

from nnscaler_ring import masks, wrap_ring_attn_func, wrap_ring_attn_varlen_func
from nnscaler_ring.core.exchange import EXCHANGES
from tests.cases import OPS, Case, check, make_documents
from tests.masks import examples, random_mask
from tests.oracle import make_qkv

SHARDS = {1: (48,), 3: (17, 0, 31), 4: (12, 12, 12, 12)}


def cases(op: str) -> list[Case]:
    """The examples of every kind; packed, masks of any kind in documents of any lengths."""
    rng = random.Random(f"masks of {op}")
    packed = op == "varlen"
    chosen = [random_mask(rng, 48, packed=True) for _ in range(15)] if packed else examples()
    ways = itertools.cycle(itertools.product(EXCHANGES, (3, 4, 1), ("torch_cpu", "reference")))
    found = []
    for seed, (mask, (exchange, ranks, kernel)) in enumerate(zip(chosen, ways, strict=False)):
        lens = list(SHARDS[ranks])
        case = Case(
            op=op,
            exchange=exchange,
            world_size=ranks,
            causal=True,
            window_size=(-1, -1),
            heads=((6, 2), (2, 2), (4, 1))[seed % 3],
            shard_lens=tuple(lens),
            **make_documents(rng, op, lens, ranks),
            v_head_dim=(4, 6)[seed % 2],
            kernel=kernel,
            seed=seed,
            mask=mask.text,
        )
        found.append(case.in_zigzag_order() if op == "zigzag in zigzag order" else case)
    return found


@pytest.mark.parametrize("op", OPS)
def test_masks_equal_dense(pool, op):
    check(pool, cases(op))


def test_a_mask_and_its_text_and_a_copy_are_the_same():
    q, k, v = make_qkv(0, 1, 48, 48, 2, 2, 4)
    for mask in examples():
        out = wrap_ring_attn_func(q, k, v, mask=mask)
        for same in (mask.text, str(mask), pickle.loads(pickle.dumps(mask))):
            assert torch.equal(wrap_ring_attn_func(q, k, v, mask=same), out), mask


def test_causal_and_windows_are_masks():
    q, k, v = make_qkv(1, None, 20, 20, 2, 2, 4)
    cu = torch.tensor([0, 7, 7, 20])
    for mask, options in (
        (masks.CAUSAL, {"causal": True}),
        (masks.FULL, {}),
        (masks.Window(left=3, right=0), {"causal": True, "window_size": (3, -1)}),
        (masks.Window(left=3, right=2), {"window_size": (3, 2)}),
    ):
        with_mask = wrap_ring_attn_varlen_func(q, k, v, cu, cu, mask=mask)
        assert torch.equal(with_mask, wrap_ring_attn_varlen_func(q, k, v, cu, cu, **options))


def test_prefixes_of_documents():
    """Each document has its own."""
    q, k, v = make_qkv(2, None, 20, 20, 2, 2, 4)
    cu = torch.tensor([0, 7, 20])
    out = wrap_ring_attn_varlen_func(q, k, v, cu, cu, mask=masks.Prefix([2, 5]))
    dense = masks.Documents([0, 7, 20], masks.Prefix([2, 5]))
    expected = wrap_ring_attn_func(q[None], k[None], v[None], mask=dense)[0]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
