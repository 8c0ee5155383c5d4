"""What travels: bytes counted on real ranks against the plan and against the mask's lower bound."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import nnscaler_ring
from nnscaler_ring.core.engine import attention_backward, attention_forward
from nnscaler_ring.core.exchange import EXCHANGES, Cut, Performance, Program
from nnscaler_ring.core.exchange import rounds as rounds_module
from nnscaler_ring.core.exchange.direct import direct
from nnscaler_ring.core.exchange.program import Post
from nnscaler_ring.core.exchange.rounds import rounds_of
from nnscaler_ring.core.kernels import BackwardTensors
from nnscaler_ring.core.kernels.reference import Reference
from nnscaler_ring.core.kernels.torch_cpu import TorchCpu
from nnscaler_ring.core.plan.layout import LAYOUTS
from nnscaler_ring.core.plan.schedule import CAUSAL, PairWork, Schedule, Window, row_count
from nnscaler_ring.core.ranks.groups import Traffic, find_place, group_state, group_string
from nnscaler_ring.core.ranks.transport import Transport
from nnscaler_ring.core.scores.scores import Scores
from nnscaler_ring.core.sums.online_softmax import accumulation_dtype
from tests.cases import EXCHANGES as EXCHANGE_NAMES
from tests.cases import Case, all_cases, call, random_packings, rows_of, sample
from tests.core.kernels.test_reference import one_thread  # noqa: F401
from tests.core.plan.test_schedule import (
    Problem,
    dense_problem,
    packed_problem,
    random_problems,
)
from tests.oracle import dense_gradients, make_dout, make_qkv
from tests.tolerances import assert_close_float64

HALF = (torch.bfloat16, torch.float16)
KERNELS = {"reference": Reference(), "torch_cpu": TorchCpu()}

# Public ops: q, k, v of a case go in, what each pass sent comes out.


def problem_of(case: Case) -> Problem:
    """The case as a schedule, built here from its layouts, beside its definition."""
    if case.op == "varlen":
        assert case.cu_seqlens_q is not None and case.cu_seqlens_k is not None
        return packed_problem(
            "contiguous",
            "contiguous",
            case.shard_lens,
            case.shard_lens_k,
            case.cu_seqlens_q,
            case.cu_seqlens_k,
            case.causal,
            case.window_size,
        )
    layout = "contiguous" if case.op == "ring" else "zigzag"
    lens = LAYOUTS[layout].for_shards(case.shard_lens).shard_lens
    return dense_problem(layout, layout, lens, case.causal, case.window_size)


def measure(
    ranks: list[int], cases: list[tuple[Case, torch.dtype]]
) -> list[tuple[Traffic, Traffic]]:
    """On one rank: the traffic of every case's forward and of its backward."""
    block = ranks.index(torch.distributed.get_rank())
    readings = []
    for case, dtype in cases:
        q, k, v, dout = case.inputs(dtype)
        rows, rows_k = rows_of(case, block), rows_of(case, block, keys=True)
        dim = 0 if case.op == "varlen" else 1
        q, dout = (x.index_select(dim, rows) for x in (q, dout))
        k, v = (x.index_select(dim, rows_k) for x in (k, v))
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        start = nnscaler_ring.traffic(ranks)
        out, _ = call(case, q, k, v, ranks)
        middle = nnscaler_ring.traffic(ranks)
        torch.autograd.grad(out, (q, k, v), dout)
        end = nnscaler_ring.traffic(ranks)
        readings.append((middle - start, end - middle))
    return readings


def row_elements(case: Case) -> int:
    """Elements of one row of K and one of V, over the batch."""
    batch = 1 if case.op == "varlen" else case.inputs()[0].shape[0]
    return batch * case.heads[1] * (case.head_dim + case.v_head_dim)


def check_traffic(pool, cases: list[tuple[Case, torch.dtype]]) -> None:
    """Counted bytes are what the plan says, and for "direct" the mask's lower bound."""
    for size in sorted({case.world_size for case, _ in cases}):
        group = [(case, dtype) for case, dtype in cases if case.world_size == size]
        shards = pool.run(size, measure, group, timeout=300)
        for number, (case, dtype) in enumerate(group):
            problem = problem_of(case)
            for block in range(size):
                what = f"block {block} of {case} in {dtype}"
                forward, backward = shards[block][number]
                _equals_the_plan(case, dtype, problem, block, forward, backward, what)
                if case.exchange == "direct":
                    _is_the_lower_bound(case, dtype, problem, block, forward, backward, what)


def _equals_the_plan(
    case: Case,
    dtype: torch.dtype,
    problem: Problem,
    block: int,
    forward: Traffic,
    backward: Traffic,
    what: str,
) -> None:
    row = row_elements(case)
    sent = EXCHANGES[case.exchange].program(problem.schedule, block).sent()
    kv_bytes = sent.kv_rows * row * dtype.itemsize
    assert forward.forward_kv_bytes == kv_bytes, what
    assert forward.total_bytes - forward.relayout_bytes == kv_bytes, what
    assert backward.backward_kv_bytes == kv_bytes, what
    wide = accumulation_dtype(dtype).itemsize
    assert backward.gradient_bytes == row * (
        sent.gradient_rows * dtype.itemsize + sent.summed_gradient_rows * wide
    ), what
    assert backward.forward_kv_bytes == 0, what
    moves = case.op == "zigzag"
    assert moves or not forward.relayout_bytes + backward.relayout_bytes, what


def _is_the_lower_bound(
    case: Case,
    dtype: torch.dtype,
    problem: Problem,
    block: int,
    forward: Traffic,
    backward: Traffic,
    what: str,
) -> None:
    others = [other for other in problem.ranks if other != block]
    row_bytes = row_elements(case) * dtype.itemsize
    sent = sum(len(problem.read_rows(other, block)) for other in others)
    assert forward.forward_kv_bytes == backward.backward_kv_bytes == sent * row_bytes, what
    read = sum(len(problem.read_rows(block, other)) for other in others)
    if dtype in HALF:  # float32 where a rank had to sum, so up to twice as much
        assert read * row_bytes <= backward.gradient_bytes <= 2 * read * row_bytes, what
    else:
        assert backward.gradient_bytes == read * row_bytes, what


def case_of(op: str, lens: tuple[int, ...], **fields) -> Case:
    options = {
        "exchange": "direct",
        "causal": True,
        "window_size": (-1, -1),
        "heads": (4, 2),
        "shard_lens_k": lens,
        "cu_seqlens_q": None,
        "cu_seqlens_k": None,
        "v_head_dim": 4,
        "kernel": "torch_cpu",
        "seed": 1,
    }
    return Case(op=op, world_size=len(lens), shard_lens=lens, **{**options, **fields})


USUAL = {
    "zigzag causal": case_of("zigzag", (8, 8, 8, 8)),
    "in zigzag order": case_of("zigzag in zigzag order", (8, 8, 8, 8)),
    "contiguous causal": case_of("ring", (8, 8, 8)),
    "full": case_of("ring", (6, 6, 6, 6), causal=False),
    "uneven": case_of("ring", (9, 1, 4)),
    "empty shards": case_of("ring", (0, 7, 0, 5), causal=False),
    "all empty": case_of("ring", (0, 0)),
    "zigzag uneven": case_of("zigzag", (9, 0, 4)),
    "window": case_of("ring", (8, 8, 8, 8), window_size=(5, 0)),
    "window of many shards": case_of("ring", (3, 3, 3, 3), window_size=(7, 2), causal=False),
    "wide values": case_of("zigzag", (8, 8), v_head_dim=6),
    "narrow values": case_of("zigzag", (8, 8), v_head_dim=2, seed=2),
    "documents": case_of(
        "varlen",
        (10, 10, 10),
        cu_seqlens_q=(0, 10, 15, 20, 26, 30),
        cu_seqlens_k=(0, 10, 15, 20, 26, 30),
    ),
    "a document over all": case_of(
        "varlen", (5, 5, 5), cu_seqlens_q=(0, 2, 14, 15), cu_seqlens_k=(0, 2, 14, 15)
    ),
}


@pytest.mark.parametrize("exchange", EXCHANGE_NAMES)
def test_bytes_of_the_usual_cases(pool, exchange):
    check_traffic(
        pool,
        [
            (replace(case, exchange=exchange), dtype)
            for case in USUAL.values()
            for dtype in (torch.float64, torch.float32, torch.bfloat16)
        ],
    )


def test_bytes_of_random_cases(pool):
    rng = random.Random(5)
    cases = [case for case in sample(all_cases(0), 180, seed=5) if case.world_size > 1]
    cases += [case for case in random_packings(6, 80) if case.world_size > 1]
    check_traffic(pool, [(case, rng.choice((torch.float32, torch.bfloat16))) for case in cases])


def sent_by(pool, case: Case, dtype: torch.dtype = torch.float32) -> list[tuple[Traffic, Traffic]]:
    return [readings[0] for readings in pool.run(case.world_size, measure, [(case, dtype)])]


def test_documents_that_end_with_the_shards_send_nothing(pool):
    for forward, backward in sent_by(pool, USUAL["documents"]):
        assert forward == backward == Traffic()


def test_a_window_reaches_the_neighbour_only(pool):
    """5 rows of K and V to the right neighbour; 5 rows of gradients to the left one."""
    row = row_elements(USUAL["window"]) * 4
    forward, backward = zip(*sent_by(pool, USUAL["window"]), strict=True)
    assert [x.forward_kv_bytes for x in forward] == [5 * row, 5 * row, 5 * row, 0]
    assert [x.gradient_bytes for x in backward] == [0, 5 * row, 5 * row, 5 * row]


@pytest.mark.parametrize("name", ["in zigzag order", "contiguous causal", "full"])
def test_the_usual_gradients_travel_in_the_dtype_of_the_input(pool, name):
    """One tile a step: nothing is summed before it is sent."""
    case = USUAL[name]
    problem = problem_of(case)
    for block, (_, backward) in enumerate(sent_by(pool, case, torch.bfloat16)):
        read = sum(len(problem.read_rows(block, s)) for s in problem.ranks if s != block)
        assert backward.gradient_bytes == read * row_elements(case) * 2, block


def test_zigzag_causal_sends_three_quarters_of_what_a_ring_sends(pool):
    case = USUAL["in zigzag order"]
    direct = sum(forward.total_bytes for forward, _ in sent_by(pool, case))
    ring = sum(forward.total_bytes for forward, _ in sent_by(pool, replace(case, exchange="ring")))
    assert direct == 0.75 * ring


# Plans on real transports, without the public ops: small messages, any layout, any batch.


def engine_inputs(seed: int, problem: Problem, batch: int, v_head_dim: int = 3) -> tuple:
    """q, k, v, dout of the whole sequence, [batch, tokens, heads, head_dim], float64."""
    total, total_k = (sum(map(len, x)) for x in (problem.q_tokens, problem.k_tokens))
    q, k, v = make_qkv(seed, batch, total, total_k, 4, 2, 5, v_head_dim)
    return q, k, v, make_dout(seed, q, v)


def program_of(name: str, problem: Problem, block: int, keys_per_message: int) -> Program:
    cut = Cut(2 * keys_per_message, keys_per_message)
    return EXCHANGES[name].program(problem.schedule, block, cut)


def run_plans(ranks: list[int], cases: list[tuple]) -> list[tuple]:
    """On one rank: out, lse, dq, dk, dv of its rows, and what each pass sent."""
    group = group_string(ranks)
    place, counted = find_place(group), group_state(group).traffic
    results = []
    for seed, (problem, name, keys_per_message, batch, kernel_name) in enumerate(cases):
        q, k, v, dout = engine_inputs(seed, problem, batch)
        q, dout = (x[:, problem.q_tokens[place.block]] for x in (q, dout))
        k, v = (x[:, problem.k_tokens[place.block]] for x in (k, v))
        program = program_of(name, problem, place.block, keys_per_message)
        transport = Transport(place, counted, "test", seed)
        options = {"kernel": KERNELS[kernel_name], "scores": Scores(0.4)}
        start = counted.copy()
        out, lse = attention_forward(q, k, v, exchange=Performance(program, transport), **options)
        middle = counted.copy()
        tensors = BackwardTensors(dout, None, q, k, v, out, lse)
        grads = attention_backward(
            tensors,
            exchange=Performance(program, transport),
            **options,
        )[:3]
        results.append(([out, lse, *grads], middle - start, counted.copy() - middle))
    return results


def dense_results(problem: Problem, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    """out, lse, dq, dk, dv by the oracle, which takes packed tensors without a batch."""
    options = {"softmax_scale": 0.4, **problem.mask}
    if "cu_seqlens_q" not in problem.mask:
        return list(dense_gradients(q, k, v, dout, **options))
    each = [dense_gradients(*x, **options) for x in zip(q, k, v, dout, strict=True)]
    return [torch.stack(x) for x in zip(*each, strict=True)]


def assert_rows_equal(
    problem: Problem, block: int, results: list[Tensor], expected: list[Tensor], what: str
) -> None:
    """out, lse, dq, dk, dv of a block against those of the whole sequence."""
    for n, (actual, dense) in enumerate(zip(results, expected, strict=True)):
        tokens = (problem.k_tokens if n > 2 else problem.q_tokens)[block]
        rows = torch.tensor(tokens, dtype=torch.int64)
        assert_close_float64(actual, dense.index_select(2 if n == 1 else 1, rows), f"{n} of {what}")


def check_plans(pool, cases: list[tuple]) -> None:
    for size in sorted({len(case[0].ranks) for case in cases}):
        group = [case for case in cases if len(case[0].ranks) == size]
        shards = pool.run(size, run_plans, group, timeout=300)
        for seed, (problem, name, keys_per_message, batch, _) in enumerate(group):
            q, k, v, dout = engine_inputs(seed, problem, batch)
            expected = dense_results(problem, q, k, v, dout)
            row_bytes = batch * 2 * (5 + 3) * 8
            for block in problem.ranks:
                what = f"block {block}, {name}, {keys_per_message=}, {batch=}: {problem.what}"
                results, forward, backward = shards[block][seed]
                assert_rows_equal(problem, block, results, expected, what)
                sent = program_of(name, problem, block, keys_per_message).sent()
                gradients = sent.gradient_rows + sent.summed_gradient_rows
                assert forward.total_bytes == sent.kv_rows * row_bytes, what
                assert backward.backward_kv_bytes == sent.kv_rows * row_bytes, what
                assert backward.gradient_bytes == gradients * row_bytes, what


def test_small_messages_equal_dense(pool):
    """Several rounds a step, for every layout, mask and packing."""
    rng = random.Random(7)
    problems = [p for p in random_problems(7, 160, longest=13) if 2 <= len(p.ranks) <= 4]
    cases = [
        (problem, "direct", rng.choice((2, 3, 5)), rng.choice((1, 2)), rng.choice(list(KERNELS)))
        for problem in problems
    ]
    rounds = [
        len([*rounds_of(problem.schedule, 0, keys_per_message)[0]])
        for problem, _, keys_per_message, *_ in cases
    ]
    assert sum(n > 3 for n in rounds) > 20, rounds  # more rounds than there are other ranks
    check_plans(pool, cases)


@pytest.mark.parametrize("name", ["ring", "all_gather"])
def test_other_exchanges_equal_dense_in_every_layout(pool, name):
    rng = random.Random(8)
    problems = [p for p in random_problems(8, 70) if 2 <= len(p.ranks) <= 4]
    check_plans(pool, [(p, name, 0, rng.choice((1, 2)), "reference") for p in problems])


@pytest.mark.parametrize("layout", ["striped", "zigzag", "contiguous"])
def test_small_messages_of_a_batch(pool, layout):
    """Rows of a batch of two are not one piece of memory unless a message is a whole shard."""
    cases = []
    for keys_per_message in (2, 3, 5, 100):
        for lens in ((12, 12), (11, 12, 13), (9, 9, 9, 9)):
            problem = dense_problem(layout, layout, lens, True, (-1, -1))
            cases.append((problem, "direct", keys_per_message, 2, "torch_cpu"))
            problem = dense_problem(layout, "contiguous", lens, False, (7, 3))
            cases.append((problem, "direct", keys_per_message, 2, "torch_cpu"))
    check_plans(pool, cases)


# Shards of very different lengths, or windows: the pairs of a distance have unlike needs.
UNLIKE = {
    "window": dense_problem("contiguous", "contiguous", (64, 64, 64), True, (5, -1)),
    "uneven": dense_problem("contiguous", "contiguous", (64, 3, 40), False, (-1, -1)),
    "uneven zigzag": dense_problem("zigzag", "zigzag", (70, 0, 9), True, (-1, -1)),
}


def messages_of(problem: Problem, keys: int, sender: int) -> int:
    """Messages of K and V by the rule, restated: a power of two, an eighth of `keys` at least."""
    count = 0
    for rank in set(problem.ranks) - {sender}:
        rows = len(problem.read_rows(rank, sender))
        parts = 1
        while 2 * parts * keys <= max(map(len, problem.k_tokens)) and 2 * parts <= -(
            -rows // (keys // 8)
        ):
            parts *= 2
        count += parts if rows else 0
    return count


def test_messages_follow_the_rows_that_a_pair_needs(pool):
    """Counted on real ranks; K and V of one run travel apart, so every message counts twice."""
    cases = [(problem, "direct", 16, 1, "torch_cpu") for problem in UNLIKE.values()]
    check_plans(pool, cases)
    shards = pool.run(3, run_plans, cases, timeout=60)
    for number, problem in enumerate(UNLIKE.values()):
        for rank in problem.ranks:
            _, forward, backward = shards[rank][number]
            kv = 2 * messages_of(problem, 32, rank)
            assert forward.messages == kv, problem.what
            homebound = [
                2 * (row_count(x.incoming.rows) > 0)
                for x in rounds_of(problem.schedule, rank, 16)[0]
            ]
            kv = 2 * messages_of(problem, 16, rank)
            assert backward.messages == kv + sum(homebound), problem.what


@pytest.mark.parametrize(("keys", "left"), [(8192, 511), (2048, 511), (2048, 5), (2048, 60_000)])
def test_a_window_over_long_shards_is_not_cut_into_crumbs(keys, left):
    """It used to travel in as many messages as the whole shard would: 512 here."""
    tokens = 1 << 20
    layout = LAYOUTS["contiguous"].for_shards((tokens,) * 3)
    schedule = Schedule(layout, layout, Window(left, 0))
    rounds = rounds_of(schedule, 1, keys)[0]
    lengths = [row_count(x.incoming.rows) for x in rounds if x.incoming.rows]
    assert sum(lengths) == left
    assert len(lengths) == max(1, 2 ** ((-(-left // (keys // 8))).bit_length() - 1))
    assert max(lengths) <= keys, "no longer than the messages of a whole shard"


def test_many_messages_are_made_when_they_are_asked_for(monkeypatch):
    """The same ones, and again in the next pass."""
    for problem in [*UNLIKE.values(), *random_problems(3, 50)]:
        for rank in problem.ranks:
            kept = [*rounds_of(problem.schedule, rank, 3)[0]]
            with monkeypatch.context() as patch:
                patch.setattr(rounds_module, "KEPT_ROUNDS", -1)
                made = rounds_of(problem.schedule, rank, 3)[0]
            for _ in range(2):
                assert [*made] == kept, problem.what


def test_a_plan_does_not_grow_with_the_tokens(monkeypatch):
    """1e9 tokens on 64 ranks travel in 10^5 messages; a plan makes none of them."""
    cut = []
    step = PairWork.step
    monkeypatch.setattr(PairWork, "step", lambda *x: cut.append(x) or step(*x))
    layout = LAYOUTS["zigzag"].for_shards((10**9 // 64 // 2 * 2,) * 64)
    schedule = Schedule(layout, layout, CAUSAL)
    rounds = rounds_of(schedule, 5, 2048)[0]
    program = direct(schedule, 5)
    assert not cut
    first = next(iter(rounds))
    assert row_count(first.incoming.rows) <= 2 * 2048
    assert len(cut) == 2
    assert isinstance(next(iter(program.backward)), Post)
    assert len(cut) == 4


def test_halves_and_wholes_stay_in_step():
    """Zigzag: every message of a step means the same work on all ranks."""
    layout = LAYOUTS["zigzag"].for_shards((1 << 16,) * 4)
    schedule = Schedule(layout, layout, CAUSAL)
    work = {
        sum(tile.pairs() for tile in round_.incoming.tiles)
        for rank in range(4)
        for round_ in rounds_of(schedule, rank, 2048)[0]
    }
    assert len(work) == 1, work


@pytest.mark.parametrize("exchange", EXCHANGE_NAMES)
def test_plans_of_both_sides_fit(exchange):
    """All ranks together send as many rows as they take; gradients go the other way."""
    for problem in random_problems(9, 150):
        programs = [program_of(exchange, problem, rank, 3) for rank in problem.ranks]
        sent = [program.sent() for program in programs]
        if exchange == "direct":
            assert sum(s.kv_rows for s in sent) == sum(
                s.gradient_rows + s.summed_gradient_rows for s in sent
            )
            lower_bound = sum(
                len(problem.read_rows(rank, source))
                for rank in problem.ranks
                for source in problem.ranks
                if rank != source
            )
            assert sum(s.kv_rows for s in sent) == lower_bound, problem.what


def test_a_step_is_a_permutation_of_the_ranks():
    """Round n of every rank receives from one rank and sends to one, all of them different."""
    problem = dense_problem("zigzag", "zigzag", (8,) * 5, False, (-1, -1))
    all_rounds = [rounds_of(problem.schedule, rank, 2048)[0] for rank in problem.ranks]
    for n in range(4):
        rounds = [[*some][n] for some in all_rounds]
        assert sorted(x.target for x in rounds) == list(problem.ranks)
        assert sorted(x.incoming.source for x in rounds) == list(problem.ranks)
        for rank, mine in enumerate(rounds):
            assert rounds[mine.target].incoming == mine.outgoing, (rank, n)


@pytest.mark.full
def test_bytes_of_the_whole_product(pool):
    cases = [case for case in all_cases(0) if case.world_size > 1]
    check_traffic(pool, [(case, torch.bfloat16) for case in cases])


@pytest.mark.full
def test_many_small_messages_equal_dense(pool):
    rng = random.Random(11)
    problems = [p for p in random_problems(11, 3000, longest=13) if 2 <= len(p.ranks) <= 4]
    check_plans(
        pool,
        [
            (p, "direct", rng.choice((1, 2, 3, 5)), rng.choice((1, 2)), "torch_cpu")
            for p in problems
        ],
    )
