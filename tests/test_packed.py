"""Packed documents in the folded layout: exact over any packing, held or moved by the op."""

import random
from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from nnscaler_ring import (
    packed_positions,
    packed_rows,
    packed_shard_lens,
    wrap_ring_attn_varlen_func,
)
from nnscaler_ring.core.exchange import EXCHANGES
from nnscaler_ring.ring_attn_varlen import LAYOUTS_OF_VARLEN
from tests.oracle import dense_gradients, make_dout, make_qkv
from tests.ranks import RankPool
from tests.tolerances import assert_close_float64

NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Packing:
    """One call over packed documents."""

    lengths: tuple[int, ...]
    layout: str
    exchange: str
    causal: bool
    window_size: tuple[int, int]
    heads: tuple[int, int]
    seed: int

    @property
    def bounds(self) -> tuple[int, ...]:
        return (0, *accumulate(self.lengths))

    def inputs(self) -> tuple[Tensor, ...]:
        total = self.bounds[-1]
        q, k, v = make_qkv(self.seed, None, total, total, *self.heads, 4)
        return q, k, v, make_dout(self.seed, q, v)


def packings(seed: int, count: int) -> list[Packing]:
    """Many short, one huge among empty ones, equal ones, one alone; all layouts and exchanges."""
    rng = random.Random(seed)
    kinds = (
        lambda: [rng.randint(0, 9) for _ in range(rng.randint(1, 12))],
        lambda: [0, rng.randint(30, 50), 0, 1, 0, 2, 1],
        lambda: [rng.randint(1, 6)] * rng.randint(1, 9),
        lambda: [rng.randint(1, 40)],
        lambda: [1] * rng.randint(1, 40),
        lambda: [0, 0, rng.randint(0, 2)],
    )
    return [
        Packing(
            tuple(rng.choice(kinds)()),
            rng.choice([*LAYOUTS_OF_VARLEN]),
            rng.choice([*EXCHANGES]),
            rng.random() < 0.7,
            rng.choice([(-1, -1), (-1, -1), (3, -1), (5, 2)]),
            rng.choice([(2, 2), (6, 2), (4, 1)]),
            number,
        )
        for number in range(count)
    ]


def run_packings(ranks: list[int], cases: list[Packing]) -> list[list[Tensor]]:
    """On one rank: its rows, then out, lse and gradients at these rows."""
    results = []
    for case in cases:
        held = LAYOUTS_OF_VARLEN[case.layout][0]
        rows = packed_rows(torch.tensor(case.bounds), ranks, layout=held)
        lens = packed_shard_lens(case.bounds, ranks)
        q, k, v, dout = (x[rows] for x in case.inputs())
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        cu_seqlens = torch.tensor(case.bounds)
        out, lse = wrap_ring_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            causal=case.causal,
            window_size=case.window_size,
            process_group=ranks,
            shard_lens=lens,
            exchange=case.exchange,
            layout=case.layout,
            return_lse=True,
        )
        gradients = torch.autograd.grad(out, (q, k, v), dout)
        results.append([rows, *(x.detach() for x in (out, lse, *gradients))])
    return results


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_any_packing_equals_dense(pool: RankPool, ranks: int) -> None:
    cases = packings(seed=ranks, count=60)
    shards = pool.run(ranks, run_packings, cases, timeout=240)
    for number, case in enumerate(cases):
        bounds = torch.tensor(case.bounds)
        expected = dense_gradients(
            *case.inputs(),
            causal=case.causal,
            window_size=case.window_size,
            cu_seqlens_q=bounds,
            cu_seqlens_k=bounds,
        )
        everywhere = torch.cat([shard[number][0] for shard in shards])
        assert torch.equal(everywhere.sort().values, torch.arange(case.bounds[-1])), case
        for block, shard in enumerate(shards):
            rows, *actual = shard[number]
            for name, found, dense in zip(NAMES, actual, expected, strict=True):
                wanted = dense.index_select(-1 if name == "lse" else -3, rows)
                assert_close_float64(found, wanted, f"{name} of block {block} in {case}")


def test_positions_count_in_each_document() -> None:
    bounds = [0, 3, 3, 4, 9]
    assert packed_rows(bounds, None).tolist() == list(range(9))
    assert packed_positions(bounds, None).tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4]


def positions_and_rows(ranks: list[int], bounds: list[int]) -> tuple[Tensor, Tensor]:
    return packed_positions(bounds, ranks), packed_rows(bounds, ranks)


def test_positions_are_those_of_the_rows(pool: RankPool) -> None:
    bounds = [0, 3, 3, 4, 30]
    whole = packed_positions(bounds, None)
    for positions, rows in pool.run(3, positions_and_rows, bounds):
        assert torch.equal(positions, whole[rows])


def refused(ranks: list[int]) -> str:
    q = torch.zeros(2, 1, 4)
    cu_q, cu_k = torch.tensor([0, 1, 4]), torch.tensor([0, 2, 4])
    try:
        wrap_ring_attn_varlen_func(
            q, q, q, cu_q, cu_k, process_group=ranks, layout="contiguous, folded"
        )
    except ValueError as error:
        return str(error)
    return ""


def test_moved_rows_need_the_same_documents(pool: RankPool) -> None:
    assert all("cu_seqlens_k must be cu_seqlens_q" in text for text in pool.run(2, refused))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: packed_rows([1, 2], None), "cu_seqlens must start at 0, got 1"),
        (lambda: packed_rows([0, 3, 2, 4], None), "cu_seqlens must never fall, got 3 before 2"),
        (lambda: packed_rows([0], None), r"cu_seqlens must be \[documents \+ 1\]"),
        (lambda: packed_rows([0, 2], None, layout="zigzag"), "layout must be 'folded' or"),
    ],
)
def test_mistakes_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_unknown_layouts_are_refused() -> None:
    q, cu = torch.zeros(2, 1, 4), torch.tensor([0, 2])
    with pytest.raises(ValueError, match="layout must be 'contiguous' or 'folded' or"):
        wrap_ring_attn_varlen_func(q, q, q, cu, cu, layout="zigzag")
