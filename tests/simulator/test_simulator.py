"""The simulator is the distributed run, bit for bit, and equals dense attention for many ranks."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nnscaler_ring.core.plan.layout import LAYOUTS
from nnscaler_ring.core.plan.schedule import CAUSAL, FULL, Window
from nnscaler_ring.core.token_index import token_index
from nnscaler_ring.simulator import (
    GeneratedInputs,
    RingAttentionSimulator,
    SimulatedCall,
    Sizes,
    WholeInputs,
)
from tests.cases import EXCHANGES, Case, all_cases, run_case, sample
from tests.masks import examples
from tests.oracle import dense_gradients, make_dout, make_qkv
from tests.ranks import RankPool
from tests.tolerances import assert_close_float64

NAMES = ("out", "softmax_lse", "dq", "dk", "dv")
OPS = {
    "ring": ("contiguous", "contiguous"),
    "zigzag": ("zigzag", "zigzag"),
    "zigzag in zigzag order": ("zigzag", "zigzag"),
    "varlen": ("contiguous", "contiguous"),
}


def simulated(case: Case, dtype: str) -> RingAttentionSimulator:
    """The same call, simulated."""
    q_layout, k_layout = OPS[case.op]
    q, k, v, dout = (x if x.dim() == 4 else x[None] for x in case.inputs(getattr(torch, dtype)))
    sizes = Sizes(
        case.heads[0], case.heads[1], case.head_dim, case.v_head_dim, dtype, batch=q.shape[0]
    )
    lens = None if "zigzag order" in case.op else case.shard_lens
    call = SimulatedCall(
        tokens=q.shape[1],
        ranks=case.world_size,
        sizes=sizes,
        mask=Window.from_window(case.causal, case.window_size),
        q_layout=q_layout,
        k_layout=k_layout,
        exchange=case.exchange,
        kernel=case.kernel,
        shard_lens=lens,
        cu_seqlens=case.cu_seqlens_q,
    )
    return RingAttentionSimulator(call, WholeInputs(q, k, v, dout))


def distributed(ranks: list[int], cases: Sequence[Case], dtype: torch.dtype) -> list[list[Tensor]]:
    """On one rank: the rows of every result."""
    block = ranks.index(torch.distributed.get_rank())
    return [run_case(case, block, ranks if len(ranks) > 1 else None, dtype) for case in cases]


def rows_of(case: Case, block: int) -> Tensor:
    name = "zigzag" if case.op == "zigzag in zigzag order" else "contiguous"
    return token_index(LAYOUTS[name].for_shards(case.shard_lens).positions(block))


def same_tokens(case: Case) -> bool:
    """Simulated calls have as many keys as queries, cut alike."""
    return (
        case.shard_lens == case.shard_lens_k
        and case.cu_seqlens_q == case.cu_seqlens_k
        and sum(case.shard_lens) > 0
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equals_the_distributed_run_bit_for_bit(pool: RankPool, ranks: int, dtype: str) -> None:
    cases = [c for c in all_cases(1) if c.world_size == ranks and same_tokens(c)]
    cases = sample(iter(cases), 24, seed=ranks)
    assert {case.exchange for case in cases} == {*EXCHANGES}
    shards = pool.run(ranks, distributed, cases, getattr(torch, dtype), timeout=120)
    for number, case in enumerate(cases):
        check_bits(case, dtype, [shard[number] for shard in shards])


def check_bits(case: Case, dtype: str, shards: list[list[Tensor]]) -> None:
    """The simulated results are those of the ranks' shards."""
    results = simulated(case, dtype).all_ranks(backward=True)
    for block, shard in enumerate(shards):
        for name, real, whole in zip(NAMES, shard, results, strict=False):
            real = real if case.op != "varlen" else real[None]
            mine = whole.index_select(2 if name == "softmax_lse" else 1, rows_of(case, block))
            assert torch.equal(real, mine), f"{name} of block {block} in {case}"


def test_several_messages_are_the_same_bits(pool: RankPool) -> None:
    """Shards so long that they are cut, beside short ones and windows that are cut otherwise."""
    base = next(c for c in all_cases(1) if c.op == "ring" and c.exchange == "direct")
    base = replace(
        base, world_size=3, kernel="torch_cpu", heads=(2, 1), cu_seqlens_q=None, cu_seqlens_k=None
    )
    cases = []
    for lens, causal, window in (
        ((4200, 200, 4200), False, (-1, -1)),
        ((4200, 4200, 4200), True, (300, 0)),
    ):
        fields = {"shard_lens": lens, "shard_lens_k": lens, "causal": causal}
        cases.append(replace(base, window_size=window, **fields))
    shards = pool.run(3, distributed, cases, torch.float32, timeout=120)
    for number, case in enumerate(cases):
        check_bits(case, "float32", [shard[number] for shard in shards])


@pytest.mark.parametrize("exchange", ["direct", "ring", "all_gather"])
@pytest.mark.parametrize(
    "ranks", [8, pytest.param(32, marks=pytest.mark.full), pytest.param(64, marks=pytest.mark.full)]
)
def test_many_ranks_equal_dense_attention(ranks: int, exchange: str) -> None:
    rng = random.Random(ranks)
    tokens = ranks * 3 + 5
    q, k, v = make_qkv(ranks, 1, tokens, tokens, 6, 2, 4)
    dout = make_dout(ranks, q, v)
    if exchange == "ring" and ranks > 8:
        ranks = 16  # a ring's sums are made again by every rank: ranks cubed
    for q_layout, mask, window in (
        ("zigzag", CAUSAL, (-1, 0)),
        ("contiguous", FULL, (-1, -1)),
        ("striped", Window(left=rng.randint(5, 40), right=0), None),
    ):
        window = window or (mask.left, 0)
        call = SimulatedCall(
            tokens, ranks, Sizes(6, 2, 4, 4, "float64"), mask, q_layout, exchange=exchange
        )
        results = RingAttentionSimulator(call, WholeInputs(q, k, v, dout)).all_ranks(backward=True)
        dense = dense_gradients(q, k, v, dout, window_size=window)
        for name, ours, expected in zip(NAMES, results, dense, strict=False):
            assert_close_float64(ours, expected, f"{name}, {q_layout}, {exchange}")


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_masks_and_layouts_equal_dense_attention(exchange: str) -> None:
    """Examples of every kind of mask over simulated ranks, also in folded documents."""
    q, k, v = make_qkv(3, 1, 48, 48, 6, 2, 4)
    dout = make_dout(3, q, v)
    sizes = Sizes(6, 2, 4, 4, "float64")
    for number, mask in enumerate(examples()):
        layout = [*LAYOUTS][number % len(LAYOUTS)]
        call = SimulatedCall(48, 5, sizes, mask, layout, exchange=exchange)
        results = RingAttentionSimulator(call, WholeInputs(q, k, v, dout)).all_ranks(backward=True)
        dense = dense_gradients(q, k, v, dout, mask=mask)
        for name, ours, expected in zip(NAMES, results, dense, strict=False):
            assert_close_float64(ours, expected, f"{name}, {mask}, {layout}, {exchange}")


@pytest.mark.parametrize("exchange", ["direct", "ring", "all_gather"])
def test_one_share_is_a_part_of_the_whole(exchange: str) -> None:
    """Forward and backward of one rank alone, from generated rows, without the other results."""
    sizes = Sizes(4, 2, 8, 8, "float32")
    call = SimulatedCall(50, 3, sizes, CAUSAL, "zigzag", exchange=exchange)
    simulator = RingAttentionSimulator(call, GeneratedInputs(sizes, seed=3))
    whole = simulator.all_ranks(backward=True)
    for rank in range(3):
        share = simulator.rank_share(rank, backward=True)
        tokens = call.tokens_of(call.schedule.q_layout, rank)
        for name, mine, all_of_it in zip(NAMES, share, whole, strict=False):
            dim = 2 if name == "softmax_lse" else 1
            assert torch.equal(mine, all_of_it.index_select(dim, tokens)), name
        assert share.sent == whole.sent[rank]


@pytest.mark.parametrize("exchange", ["direct", "ring", "all_gather"])
def test_sent_bytes_are_what_the_plan_predicts(exchange: str) -> None:
    sizes = Sizes(4, 2, 8, 6, "bfloat16", batch=2)
    call = SimulatedCall(61, 4, sizes, CAUSAL, "zigzag", exchange=exchange)
    results = RingAttentionSimulator(call, GeneratedInputs(sizes)).all_ranks(backward=True)
    for rank, sent in enumerate(results.sent):
        predicted = sizes.sent_bytes(call.program(rank).sent())
        assert sent.forward_kv_bytes == predicted.forward_kv_bytes
        assert sent.backward_kv_bytes == predicted.backward_kv_bytes
        assert sent.gradient_bytes == predicted.gradient_bytes


def test_wrong_ranks_are_refused() -> None:
    sizes = Sizes(2, 2, 4, 4)
    simulator = RingAttentionSimulator(SimulatedCall(8, 2, sizes), GeneratedInputs(sizes))
    with pytest.raises(ValueError, match="rank must be 0 to 1, got 2"):
        simulator.rank_share(2)
