"""wrap_dilated_attn_func against the definition in dense float64, over 1 to 4 ranks."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import nnscaler_ring
from nnscaler_ring import HeadOffsets, Traffic, wrap_dilated_attn_func
from nnscaler_ring.core.exchange import EXCHANGES as REGISTERED
from nnscaler_ring.core.op.dilated_ops import DilatedOptions
from nnscaler_ring.core.ranks.groups import group_string
from tests.core.attempts import all_calls_have_one_number
from tests.dilated_oracle import dilated_gradients
from tests.oracle import dense_gradients, make_dout, make_qkv
from tests.tolerances import assert_close_float64, assert_close_relative

EXCHANGES = tuple(REGISTERED)
NAMES = ("out", "lse", "dq", "dk", "dv")
HEADS = ((4, 4), (6, 2), (4, 1), (5, 5), (6, 3))


@dataclass(frozen=True)
class Case:
    """One call over as many ranks as there are shards."""

    shard_lens: tuple[int, ...]
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    causal: bool = True
    head_offsets: str = "mod"
    heads: tuple[int, int] = (4, 4)
    exchange: str = "direct"
    kernel: str = "auto"
    v_head_dim: int = 4
    lse_gradient: bool = False
    seed: int = 0

    def inputs(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """q, k, v, dout, dlse of the whole sequence."""
        tokens, batch = sum(self.shard_lens), 1 + self.seed % 2
        q, k, v = make_qkv(self.seed, batch, tokens, tokens, *self.heads, 4, self.v_head_dim, dtype)
        generator = torch.Generator().manual_seed(self.seed)
        shape = (batch, self.heads[0], tokens)
        dlse = torch.randn(shape, generator=generator, dtype=torch.float64)
        return q, k, v, make_dout(self.seed, q, v), dlse

    def rows(self, block: int) -> slice:
        """The tokens of a block."""
        start = sum(self.shard_lens[:block])
        return slice(start, start + self.shard_lens[block])

    def expected(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """out, lse, dq, dk, dv of the whole sequence, of inputs as this dtype has them."""
        q, k, v, dout, dlse = (x.double() for x in self.inputs(dtype))
        return dilated_gradients(
            q,
            k,
            v,
            dout,
            dlse if self.lse_gradient else None,
            self.segment_lengths,
            self.dilation_rates,
            causal=self.causal,
            head_offsets=self.head_offsets,
        )


def run_case(
    case: Case, block: int, group: list[int] | None, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], Traffic, Traffic]:
    """out, lse, dq, dk, dv of a block, and what each pass sent."""
    q, k, v, dout, dlse = case.inputs(dtype)
    rows = case.rows(block)
    q, k, v = (x[:, rows].requires_grad_() for x in (q, k, v))
    even = len(set(case.shard_lens)) == 1
    start = traffic_of(group)
    out, lse = wrap_dilated_attn_func(
        q,
        k,
        v,
        case.segment_lengths,
        case.dilation_rates,
        causal=case.causal,
        head_offsets=case.head_offsets,
        process_group=group,
        return_lse=True,
        shard_lens=None if even else case.shard_lens,
        exchange=case.exchange,
        kernel=case.kernel,
    )
    middle = traffic_of(group)
    outputs, grads = [out], [dout[:, rows]]
    if case.lse_gradient:
        outputs, grads = [out, lse], [dout[:, rows], dlse[..., rows].to(lse.dtype)]
    gradients = torch.autograd.grad(outputs, (q, k, v), grads)
    end = traffic_of(group)
    results = [x.detach() for x in (out, lse, *gradients)]
    return results, middle - start, end - middle


def traffic_of(group: list[int] | None) -> Traffic:
    return Traffic() if group is None else nnscaler_ring.traffic(group)


def run_cases(ranks: list[int], cases: list[Case], dtype: torch.dtype) -> list[tuple]:
    """On one rank."""
    block = ranks.index(dist.get_rank())
    return [run_case(case, block, ranks, dtype) for case in cases]


def check(pool, cases: Sequence[Case], ranks: Sequence[int] | None = None) -> None:
    """Run the cases and compare values, lse and gradients."""
    for size in sorted({len(case.shard_lens) for case in cases}):
        group = [case for case in cases if len(case.shard_lens) == size]
        chosen = list(ranks) if ranks else list(range(size))
        results = pool.run(None, run_cases, group, torch.float64, ranks=chosen, timeout=300)
        for number, case in enumerate(group):
            compare(case, [of_rank[number][0] for of_rank in results])


def compare(case: Case, blocks: Sequence[Sequence[Tensor]]) -> None:
    expected = case.expected()
    for block, tensors in enumerate(blocks):
        rows = case.rows(block)
        for name, actual, dense in zip(NAMES, tensors, expected, strict=True):
            part = dense[..., rows] if name == "lse" else dense[:, rows]
            assert_close_float64(actual, part, f"{name} of block {block} in {case}")


def random_cases(seed: int, count: int) -> list[Case]:
    """Segments below, at and above the shard length and above all tokens, in any order."""
    rng = random.Random(seed)
    cases = []
    for number in range(count):
        world_size = number % 4 + 1
        shard_lens = [rng.randint(1, 12)] * world_size
        if rng.random() < 0.5:
            shard_lens = [rng.choice((0, 1, rng.randint(2, 20))) for _ in range(world_size)]
        total = sum(shard_lens)
        lengths = [
            rng.choice((rng.randint(1, 8), max(1, max(shard_lens)), total + 1, 2 * total + 5, 12))
            for _ in range(rng.randint(1, 4))
        ]
        rates = [min(length, rng.choice((1, 1, 2, 2, 3, 4, 5, 9))) for length in lengths]
        cases.append(
            Case(
                shard_lens=tuple(shard_lens),
                segment_lengths=tuple(lengths),
                dilation_rates=tuple(rates),
                causal=rng.random() < 0.5,
                head_offsets=rng.choice(("mod", "block")),
                heads=rng.choice(HEADS),
                exchange=rng.choice(EXCHANGES),
                kernel=rng.choice(("auto", "reference")),
                v_head_dim=rng.choice((4, 4, 3, 6)),
                lse_gradient=rng.random() < 0.3,
                seed=number,
            )
        )
    return cases


def test_random_configurations(pool):
    check(pool, random_cases(0, 280))


@pytest.mark.full
def test_many_random_configurations(pool):
    check(pool, random_cases(1, 3000))


def test_ranks_in_any_order(pool):
    case = Case((5, 0, 9), (6, 40), (2, 3), heads=(6, 2))
    check(pool, [case, replace(case, exchange="ring"), replace(case, causal=False)], [3, 0, 2])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("world_size", [1, 3])
def test_one_long_undilated_branch_is_dense_attention(pool, world_size, causal):
    case = Case((7,) * world_size, (7 * world_size,), (1,), causal, heads=(6, 2))
    q, k, v, dout, _ = case.inputs()
    dense = dense_gradients(q, k, v, dout, causal=causal)
    for block, results in enumerate(pool.run(world_size, run_cases, [case], torch.float64)):
        for name, actual, whole in zip(NAMES, results[0][0], dense, strict=True):
            part = whole.narrow(2 if name == "lse" else 1, 7 * block, 7)
            assert_close_float64(actual, part, f"{name} of block {block}")


def test_a_key_that_two_branches_show_counts_twice():
    """The same branch twice is the same softmax: its lse grows by log 2, its values stay."""
    once, twice = Case((16,), (8,), (2,)), Case((16,), (8, 8), (2, 2))
    (out, lse, *_), (out2, lse2, *_) = (run_case(case, 0, None)[0] for case in (once, twice))
    assert_close_float64(out2, out, "out")
    assert_close_float64(lse2, lse + torch.tensor(2.0, dtype=torch.float64).log(), "lse")


def test_rows_that_no_branch_covers_are_zero():
    """With r = 3 and one head of offset 0, two of three tokens are not used."""
    case = Case((9,), (9,), (3,), heads=(1, 1))
    results, *_ = run_case(case, 0, None)
    unused = torch.tensor([n % 3 != 0 for n in range(9)])
    for name, x in zip(NAMES, results, strict=True):
        rows = x[..., unused] if name == "lse" else x[:, unused]
        assert (rows == (-torch.inf if name == "lse" else 0.0)).all(), name


@pytest.mark.parametrize("grouping", ["mod", "block"])
def test_parts_of_the_heads_are_the_whole(grouping):
    """What a rank computes that holds a part of the heads and says where it begins."""
    case = Case((24,), (8, 24), (2, 3), head_offsets=grouping, heads=(10, 5))
    q, k, v, _, _ = case.inputs()
    branches = case.segment_lengths, case.dilation_rates
    whole = wrap_dilated_attn_func(q, k, v, *branches, head_offsets=grouping)
    for first, stop in ((0, 2), (2, 5)):
        part = wrap_dilated_attn_func(
            q[:, :, 2 * first : 2 * stop],
            k[:, :, first:stop],
            v[:, :, first:stop],
            *branches,
            head_offsets=HeadOffsets(grouping, first, 5),
        )
        assert_close_float64(part, whole[:, :, 2 * first : 2 * stop], f"heads {first} to {stop}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(pool, dtype):
    case = Case((20, 20), (8, 40, 40), (1, 2, 4), heads=(4, 2), seed=3)
    expected = case.expected(dtype)
    for block, results in enumerate(pool.run(2, run_cases, [case], dtype)):
        rows = case.rows(block)
        for n, (name, actual) in enumerate(zip(NAMES, results[0][0], strict=True)):
            assert actual.dtype == (torch.float32 if name == "lse" else dtype)
            part = expected[n][..., rows] if name == "lse" else expected[n][:, rows]
            assert_close_relative(actual, part, f"{name} of block {block}")


# Bytes.


def used_rows(case: Case, reader: int, source: int) -> tuple[int, int]:
    """Rows of a head that cross from `source` to `reader`: summed over branches, and dense."""
    total = 0
    mine, theirs = (
        torch.arange(case.rows(block).start, case.rows(block).stop) for block in (reader, source)
    )
    per_head = []
    for head in range(case.heads[1]):
        total = 0
        for w, r in zip(case.segment_lengths, case.dilation_rates, strict=True):
            blocks = -(-case.heads[1] // r)
            offset = head % r if case.head_offsets == "mod" else head // blocks
            q, k = (x[x % w % r == offset] for x in (mine, theirs))
            seen = q[:, None] // w == k // w
            if case.causal:
                seen &= q[:, None] >= k
            total += int(seen.any(0).sum())
        per_head.append(total)
    dense = len(theirs) if len(mine) and (not case.causal or reader >= source) else 0
    return sum(per_head), dense * case.heads[1]


def check_bytes(pool, cases: Sequence[Case]) -> list[int]:
    """Forward rows and gradients of every case are within both bounds; all rows received."""
    received = []
    for case in cases:
        size = len(case.shard_lens)
        results = pool.run(size, run_cases, [case], torch.float64)
        row_bytes = (1 + case.seed % 2) * (4 + case.v_head_dim) * 8
        for block in range(size):
            _, forward, backward = results[block][0]
            pairs = [used_rows(case, other, block) for other in range(size) if other != block]
            limit = sum(map(min, pairs)) * row_bytes
            if case.exchange == "direct":
                assert forward.forward_kv_bytes <= limit, case
            else:
                longest = max(case.shard_lens)
                assert forward.forward_kv_bytes <= (
                    (size - 1) * longest * case.heads[1] * row_bytes
                ), case
            assert forward.total_bytes == forward.forward_kv_bytes == backward.backward_kv_bytes
        sent = [results[block][0][1].forward_kv_bytes for block in range(size)]
        returned = [results[block][0][2].gradient_bytes for block in range(size)]
        if case.exchange == "direct":
            assert sum(sent) == sum(returned), case
        received.append(sum(sent) // row_bytes)
    return received


def test_no_more_bytes_than_the_branches_use_nor_than_dense(pool):
    check_bytes(pool, [case for case in random_cases(4, 160) if len(case.shard_lens) > 1])


REPEATED = Case((9, 9, 9), (27, 27, 18), (1, 2, 1), heads=(4, 2), seed=1)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("causal", [True, False])
def test_rows_of_several_branches_travel_once(pool, exchange, causal):
    """Two undilated branches and one dilated use 2.5 rows per row of the shard; 1 travels."""
    case = replace(REPEATED, exchange=exchange, causal=causal)
    check(pool, [case, replace(case, shard_lens=(13, 0, 14)), replace(case, lse_gradient=True)])
    (received,) = check_bytes(pool, [case])
    shards = 6 if exchange in ("ring", "all_gather") or not causal else 3
    assert received == shards * 9 * case.heads[1]


@pytest.mark.parametrize(("world_size", "w", "r"), [(4, 16, 2), (4, 32, 4), (2, 16, 1), (4, 32, 2)])
def test_bytes_of_one_spanning_branch(pool, world_size, w, r):
    """The issue's formula: `(w - l)/r * 2 * H_kv * D` elements per rank, not causal."""
    case = Case((8,) * world_size, (w,), (r,), causal=False, heads=(8, 4))
    for results in pool.run(world_size, run_cases, [case], torch.float64):
        forward = results[0][1]
        assert forward.forward_kv_bytes == (w - 8) // r * 2 * 4 * 4 * 8
        assert results[0][2].gradient_bytes == forward.forward_kv_bytes


def test_whole_segments_send_nothing(pool):
    case = Case((12, 12, 12), (4, 6, 12), (1, 2, 3), causal=False)
    for results in pool.run(3, run_cases, [case], torch.float64):
        assert results[0][1] == results[0][2] == Traffic()


def test_bytes_do_not_grow_with_the_sequence(pool):
    """With w / r constant, a branch over all shards costs less than w / r rows, however long."""
    for tokens in (8, 16, 32, 64):
        case = Case((tokens,) * 4, (4 * tokens,), (tokens // 2,), causal=False, heads=(1, 1))
        for results in pool.run(4, run_cases, [case], torch.float64):
            assert results[0][1].forward_kv_bytes <= 8 * 2 * 4 * 8


# Errors.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([8, 16], [1]), ValueError, "dilation_rates must have one rate per segment length, 2"),
        (([], []), ValueError, "segment_lengths must have one entry per branch"),
        (([0], [1]), ValueError, r"segment_lengths must be >= 1, got \[0\]"),
        (([4], [0]), ValueError, r"dilation_rates must be >= 1, got \[0\]"),
        (([4, 2], [1, 3]), ValueError, "rate 3 for length 2"),
        ((8, [1]), TypeError, "segment_lengths must be a sequence of ints, got int"),
        (([8], [1.5]), TypeError, "dilation_rates must hold ints"),
        (([8], [True]), TypeError, "dilation_rates must hold ints"),
    ],
)
def test_wrong_branches(arguments, error, message):
    q, k, v, *_ = Case((8,), (8,), (1,)).inputs()
    with pytest.raises(error, match=message):
        wrap_dilated_attn_func(q, k, v, *arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"head_offsets": "modulo"}, ValueError, "head_offsets must be one of"),
        ({"head_offsets": HeadOffsets("mod", 2, 5)}, ValueError, "4 KV heads among num_kv_heads=5"),
        ({"head_offsets": HeadOffsets("mod", -1, 9)}, ValueError, "got first_kv_head=-1"),
        ({"head_offsets": HeadOffsets("mod", 0.5)}, TypeError, "head_offsets.first_kv_head must"),
        ({"causal": 1}, TypeError, "causal must be True or False"),
        ({"exchange": "carrier pigeon"}, ValueError, "exchange must be one of"),
        ({"kernel": "abacus"}, ValueError, "kernel must be 'auto' or one of"),
        ({"return_lse": 1}, TypeError, "return_lse must be True or False"),
        ({"shard_lens": [4, 4]}, ValueError, "shard_lens must have one length for each of the 1"),
        ({"shard_lens": [7]}, ValueError, "tokens that this rank passes, 8, got 7"),
        ({"softmax_scale": float("nan")}, ValueError, "softmax_scale must be finite"),
        ({"dropout_p": 0.5}, TypeError, "unexpected keyword argument 'dropout_p'"),
    ],
)
def test_wrong_options(options, error, message):
    q, k, v, *_ = Case((8,), (8,), (1,)).inputs()
    with pytest.raises(error, match=message):
        wrap_dilated_attn_func(q, k, v, [8], [1], **options)


def test_wrong_tensors():
    q, k, v, *_ = Case((8,), (8,), (1,)).inputs()
    with pytest.raises(ValueError, match="num_heads of q must be a multiple of num_kv_heads"):
        wrap_dilated_attn_func(q, k[:, :, :3], v[:, :, :3], [8], [1])
    with pytest.raises(ValueError, match="k must have q's dtype"):
        wrap_dilated_attn_func(q, k.float(), v, [8], [1])


def disagree(ranks: list[int], difference: str) -> str:
    """On one rank: what it is told when rank 1 passes something else."""
    q, k, v, *_ = Case((8,), (8,), (1,)).inputs()
    arguments = {"segment_lengths": [8], "dilation_rates": [2], "process_group": ranks}
    if ranks.index(dist.get_rank()) == 1:
        arguments |= {
            "segments": {"segment_lengths": [16]},
            "rates": {"dilation_rates": [1]},
            "offsets": {"head_offsets": "block"},
            "causal": {"causal": False},
            "refused": {"dilation_rates": [9]},
        }[difference]
    with pytest.raises(ValueError, match="wrap_dilated_attn_func|dilation_rates") as error:
        wrap_dilated_attn_func(q, k, v, **arguments)
    return str(error.value)


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        ("segments", "ranks disagree on segment_lengths: rank 0 has [8], rank 1 has [16]"),
        ("rates", "ranks disagree on dilation_rates: rank 0 has [2], rank 1 has [1]"),
        ("offsets", "ranks disagree on head_offsets"),
        ("causal", "ranks disagree on causal: rank 0 has True, rank 1 has False"),
        ("refused", "rank 1 refused its call of wrap_dilated_attn_func: ValueError"),
    ],
)
def test_ranks_that_disagree(pool, difference, message):
    assert message in pool.run(2, disagree, difference)[0]


# torch.library.


def compiled_and_checked(ranks: list[int]) -> None:
    """On one rank: compiled whole equals eager; opcheck; checkpointing that saves the op."""
    case = Case((6, 6), (4, 9, 24), (2, 3, 1), heads=(4, 2))
    q, k, v, dout, _ = case.inputs()
    rows = case.rows(ranks.index(dist.get_rank()))
    q, k, v, dout = (x[:, rows] for x in (q, k, v, dout))

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = wrap_dilated_attn_func(
            2 * q, k, v, [4, 9, 24], [2, 3, 1], causal=False, process_group=ranks
        )
        return 3 * out

    def results(function) -> list[Tensor]:
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, dout)]

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    eager = results(model)
    assert all(torch.equal(x, y) for x, y in zip(eager, results(compiled), strict=True))

    def save_attention(_, op, *args, **kwargs) -> CheckpointPolicy:
        saved = op is torch.ops.nnscaler_ring.dilated_attention.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    context_fn = partial(create_selective_checkpoint_contexts, save_attention)
    messages = []
    for options in (None, {}, {"context_fn": context_fn}):
        before = nnscaler_ring.traffic(ranks)
        if options is None:
            again = results(model)
        else:
            again = results(partial(checkpoint, model, use_reentrant=False, **options))
        messages.append((nnscaler_ring.traffic(ranks) - before).messages)
        assert all(torch.equal(x, y) for x, y in zip(eager, again, strict=True))
    assert messages[0] == messages[2] < messages[1]

    options = DilatedOptions(
        "wrap_dilated_attn_func", group_string(ranks), None, [4, 9], [2, 3], True, "mod", 0, 2,
        0.5, "direct", "auto",
    )  # fmt: skip
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    with all_calls_have_one_number():
        torch.library.opcheck(torch.ops.nnscaler_ring.dilated_attention, (*inputs, *options))


def test_compile_checkpoint_opcheck(pool):
    pool.run(2, compiled_and_checked, timeout=240)


def test_meta_tensors():
    q, k, v, *_ = (x.to("meta").requires_grad_() for x in Case((8,), (8,), (1,)).inputs())
    out, lse = wrap_dilated_attn_func(q, k, v, [4, 8], [1, 2], return_lse=True)
    assert out.is_meta and out.shape == (1, 8, 4, 4) and lse.shape == (1, 4, 8)
    out.sum().backward()
    assert q.grad is not None and q.grad.shape == q.shape
