"""The harness itself: ranks, oracle and tolerances."""

import math
import os
import random
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from nnscaler_ring.core.ranks.groups import group_of, group_string
from tests.cases import start_on
from tests.oracle import (
    dense_attention,
    dense_gradients,
    make_dout,
    make_qkv,
    random_cu_seqlens,
    visible,
)
from tests.ranks import RankFailure, RankPool, RankTimeout, rank_environment, run_fresh
from tests.tolerances import (
    assert_as_good_as_one_device,
    assert_close_float64,
    assert_close_relative,
    relative_l2,
)

# What the ranks run: functions of this module, so that they can be found by name.


def position(ranks):
    return ranks.index(dist.get_rank()), dist.get_rank(), dist.get_world_size()


def sum_of_positions(ranks):
    group = group_of(group_string(ranks))
    mine = torch.tensor([10.0 ** ranks.index(dist.get_rank())])
    dist.all_reduce(mine, group=group)
    return mine


def echo(ranks, *args, **kwargs):
    return args, kwargs


def draw(ranks):
    return torch.rand(3)


def threads(ranks):
    return torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")


def weighted(ranks):
    return torch.ones(3, requires_grad=True) * 2  # not a leaf


def fail_on(ranks, bad):
    if dist.get_rank() in bad:
        raise ValueError(f"rank {dist.get_rank()} is not well")


def sleep_on(ranks, bad):
    if dist.get_rank() in bad:
        time.sleep(60)


def fail_while_one_sleeps(ranks):
    fail_on(ranks, [0])
    sleep_on(ranks, [1])


def leave_on(ranks, bad):
    if dist.get_rank() in bad:
        os._exit(7)


def return_lambda(ranks):
    return lambda: None


def meet(ranks, absent=()):
    if dist.get_rank() not in absent:
        dist.all_reduce(torch.ones(1))


def meet_after_exit(ranks, bad):
    leave_on(ranks, bad)
    meet(ranks)


# The pool.


def test_pool_runs_on_a_part_of_its_ranks(pool):
    assert pool.run(3, position) == [(0, 0, pool.size), (1, 1, pool.size), (2, 2, pool.size)]


def test_pool_runs_on_chosen_ranks_in_the_given_order(pool):
    assert pool.run(None, position, ranks=[3, 1, 0]) == [
        (0, 3, pool.size),
        (1, 1, pool.size),
        (2, 0, pool.size),
    ]


def test_pool_starts_on_a_device(pool):
    """What the fixture `device` has every rank do before a test on a GPU."""
    assert pool.run(pool.size, start_on, "cpu") == [None] * pool.size


def test_pool_ranks_reach_one_another_in_a_subgroup(pool):
    assert [x.item() for x in pool.run(None, sum_of_positions, ranks=[3, 1, 0])] == [111.0] * 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32, torch.bool])
def test_tensors_travel_there_and_back(pool, dtype):
    strided = (torch.arange(24).reshape(4, 6) % 5).to(dtype)[:, ::2]
    ((args, kwargs),) = pool.run(1, echo, [strided, (None, "x")], {"empty": strided[:0]}, key=1.5)
    (tensors, rest), named = args[0], args[1]
    assert torch.equal(tensors, strided) and tensors.dtype == dtype
    assert rest == (None, "x") and kwargs == {"key": 1.5}
    assert named["empty"].shape == (0, 3) and named["empty"].dtype == dtype


def test_a_result_with_a_history_travels(pool):
    assert torch.equal(pool.run(1, weighted)[0], torch.full((3,), 2.0))


def test_ranks_are_seeded_alike_in_every_call_but_not_among_themselves(pool):
    first, again = pool.run(2, draw), pool.run(2, draw)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])


def test_ranks_have_one_thread(pool):
    assert pool.run(2, threads) == [(1, "1"), (1, "1")]


@pytest.mark.parametrize("before", [None, "3"])
def test_the_environment_of_the_ranks_is_put_back(monkeypatch, before):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if before is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", before)
    with rank_environment():
        assert os.environ["OMP_NUM_THREADS"] == "1"
    assert os.environ.get("OMP_NUM_THREADS") == before
    assert "GLOO_SOCKET_IFNAME" not in os.environ


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"world_size": 7}, "must be in 0..5"),
        ({"world_size": 0}, "distinct and not empty"),
        ({"world_size": 2, "ranks": [1]}, "ranks has 1 entries"),
        ({"world_size": None, "ranks": [1, 1]}, "distinct"),
        ({"world_size": None}, "give world_size or ranks"),
    ],
)
def test_pool_refuses_wrong_ranks(pool, arguments, message):
    with pytest.raises(ValueError, match=message):
        pool.run(fn=position, **arguments)


@pytest.fixture
def small_pool():
    ranks = RankPool(start_size=2, max_size=3)
    yield ranks
    ranks.close()


def test_a_failure_has_every_traceback_and_the_pool_recovers(small_pool):
    with pytest.raises(RankFailure) as failure:
        small_pool.run(None, fail_on, ranks=[1, 0], bad=[1])
    message = str(failure.value)
    assert "fail_on on ranks [1, 0]: failed on ranks [1]" in message
    assert "ValueError: rank 1 is not well" in message and "in fail_on" in message
    assert "--- rank 0 ---\nreturned" in message
    with pytest.raises(RankFailure, match="pickle"):
        small_pool.run(1, return_lambda)
    assert small_pool.run(2, position) == [(0, 0, 2), (1, 1, 2)]


@pytest.mark.slow
def test_dead_and_silent_ranks_are_named_and_the_pool_grows(small_pool, monkeypatch):
    with pytest.raises(RankFailure, match="rank 1 ---\ndied with exit code 7"):
        small_pool.run(2, leave_on, bad=[1])
    small_pool.run(2, position)  # imports this module, outside the short timeout below
    with pytest.raises(RankTimeout, match=r"no answer from ranks \[1\]") as silence:
        small_pool.run(2, sleep_on, bad=[1], timeout=1.0)
    assert "in sleep_on" in str(silence.value)  # where the silent rank is
    monkeypatch.setattr("tests.ranks.GRACE_SECONDS", 0.5)
    with pytest.raises(RankFailure, match=r"failed on ranks \[0\] no answer from ranks \[1\]"):
        small_pool.run(2, fail_while_one_sleeps, timeout=600)
    assert small_pool.run(3, position) == [(0, 0, 3), (1, 1, 3), (2, 2, 3)]


# Fresh ranks.


@pytest.mark.slow
@pytest.mark.parametrize("init", ["file", "tcp"])
def test_fresh_ranks_tell_death_from_error(init):
    outcomes = run_fresh(2, meet_after_exit, bad=[1], init=init, timeout_seconds=20)
    assert [outcome.kind for outcome in outcomes] == ["error", "died"]
    assert outcomes[0].error in ("RuntimeError", "DistBackendError") and outcomes[0].message
    assert outcomes[1].exit_code == 7


@pytest.mark.slow
def test_fresh_ranks_have_the_given_timeout_and_can_be_killed():
    outcomes = run_fresh(3, meet, absent=[1, 2], timeout_seconds=1.5)
    assert [outcome.kind for outcome in outcomes] == ["error", "result", "result"]
    assert "1500ms" in outcomes[0].message
    outcomes = run_fresh(2, sleep_on, bad=[1], kill={1: 0.2})
    assert [outcome.kind for outcome in outcomes] == ["result", "died"]
    assert outcomes[1].exit_code == -9
    with pytest.raises(RankTimeout, match=r"no answer from ranks \[0\]"):
        run_fresh(1, sleep_on, bad=[0], answer_seconds=0.3)


# The oracle.


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("softmax_scale", [None, 0.3])
def test_oracle_matches_torch(causal, softmax_scale):
    q, k, v = make_qkv(1, 2, 33, 33, 6, 2, 8, 8)
    dout = make_dout(1, q, v)
    ours = dense_gradients(q, k, v, dout, causal=causal, softmax_scale=softmax_scale)
    leaves = [x.transpose(1, 2).clone().requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(
        *leaves, is_causal=causal, scale=softmax_scale, enable_gqa=True
    )
    theirs = [out, *torch.autograd.grad(out, leaves, dout.transpose(1, 2))]
    for name, actual, expected in zip(
        ("out", "dq", "dk", "dv"), (ours[0], *ours[2:]), theirs, strict=True
    ):
        assert_close_float64(actual, expected.transpose(1, 2), name)


def test_oracle_lse_and_its_gradient():
    q, k, v = make_qkv(2, 1, 5, 7, 2, 1, 4, 3)
    dout, dlse = make_dout(2, q, v), torch.randn(1, 2, 5, dtype=torch.float64)
    out, lse, dq, *_ = dense_gradients(q, k, v, dout, dlse=dlse)
    assert out.shape == (1, 5, 2, 3)
    scores = torch.einsum("bqhd,bkd->bhqk", q, k[:, :, 0]) / 2
    assert_close_float64(lse, scores.exp().sum(-1).log(), "lse")
    step = 1e-6 * torch.randn(q.shape, dtype=torch.float64)  # a directional derivative
    ahead, behind = (dense_attention(q + sign * step, k, v) for sign in (1, -1))
    change = ((ahead[0] - behind[0]) * dout).sum() + ((ahead[1] - behind[1]) * dlse).sum()
    assert math.isclose(change.item() / 2, (dq * step).sum().item(), rel_tol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (0, 0), (2, -1), (-1, 1), (3, 2)])
@pytest.mark.parametrize(("tq", "tk"), [(5, 5), (3, 7), (7, 3), (1, 4), (4, 0), (0, 4)])
def test_visible_follows_the_definition(tq, tk, causal, window):
    left, right = window[0], 0 if causal else window[1]
    sees = visible(tq, tk, causal=causal, window_size=window)
    for i in range(tq):
        for j in range(tk):
            distance = j - (i + tk - tq)
            expected = (left < 0 or distance >= -left) and (right < 0 or distance <= right)
            assert sees[i, j] == expected, (i, j)


def test_packed_oracle_is_one_call_per_document():
    rng = random.Random(3)
    bounds_q, bounds_k = random_cu_seqlens(rng, 40, 6), random_cu_seqlens(rng, 30, 6)
    q, k, v = make_qkv(3, None, 40, 30, 4, 2, 8)
    options = {"causal": True, "window_size": (5, -1)}
    out, lse = dense_attention(q, k, v, cu_seqlens_q=bounds_q, cu_seqlens_k=bounds_k, **options)
    assert lse.shape == (4, 40)
    for document in range(6):
        rows = slice(int(bounds_q[document]), int(bounds_q[document + 1]))
        keys = slice(int(bounds_k[document]), int(bounds_k[document + 1]))
        one, one_lse = dense_attention(q[None, rows], k[None, keys], v[None, keys], **options)
        assert_close_float64(out[rows], one[0], f"out of document {document}")
        assert_close_float64(lse[:, rows], one_lse[0], f"lse of document {document}")


@pytest.mark.parametrize(
    ("tq", "tk", "options"),
    [(6, 2, {"causal": True}), (4, 0, {}), (5, 5, {"cu_seqlens_k": [0, 0, 5]})],
    ids=["more queries than keys", "no keys", "a document without keys"],
)
def test_rows_that_see_nothing(tq, tk, options):
    q, k, v = make_qkv(4, None, tq, tk, 2, 2, 4)
    options = {"cu_seqlens_q": [0, 3, tq], "cu_seqlens_k": [0, 0, tk], **options}
    dlse = torch.ones(2, tq, dtype=torch.float64)
    results = dense_gradients(q, k, v, make_dout(4, q, v), dlse=dlse, **options)
    out, lse, dq, dk, dv = results
    blind = ~visible(tq, tk, **options).any(1)
    assert blind.any()
    assert (out[blind] == 0).all() and (lse[:, blind] == -math.inf).all()
    assert (dq[blind] == 0).all()
    assert lse[:, ~blind].isfinite().all()
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))


def test_random_cu_seqlens_has_the_awkward_documents():
    rng = random.Random(0)
    for _ in range(100):
        total, documents = rng.randint(1, 50), rng.randint(3, 8)
        bounds = random_cu_seqlens(rng, total, documents)
        lengths = bounds.diff().tolist()
        assert bounds.dtype == torch.int32 and len(bounds) == documents + 1
        assert bounds[0] == 0 and bounds[-1] == total and min(lengths) >= 0
        assert 0 in lengths and 1 in lengths
    assert random_cu_seqlens(rng, 0, 3).tolist() == [0, 0, 0, 0]
    assert random_cu_seqlens(rng, 9, 1).tolist() == [0, 9]


def test_inputs_are_the_same_for_the_same_seed():
    first, again, other = (make_qkv(seed, 2, 5, 4, 6, 2, 8, 3) for seed in (7, 7, 8))
    assert [tuple(x.shape) for x in first] == [(2, 5, 6, 8), (2, 4, 2, 8), (2, 4, 2, 3)]
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(first, other, strict=True))
    assert make_dout(7, first[0], first[2]).shape == (2, 5, 6, 3)


# The tolerances.


def test_assert_close_float64_tells_where():
    expected = torch.tensor([[0.0, 1.0], [-math.inf, 3.0]], dtype=torch.float64)
    assert_close_float64(expected + 1e-12, expected, "lse")
    assert_close_float64(expected[:0], expected[:0], "nothing")
    wrong = expected.clone()
    wrong[1, 1] += 1e-3
    with pytest.raises(AssertionError, match=r"lse: largest error 1.000e-03 at \(1, 1\)"):
        assert_close_float64(wrong, expected, "lse")
    for value in (math.nan, math.inf, -1e300):
        wrong = torch.where(expected == -math.inf, value, expected)
        with pytest.raises(AssertionError, match=r"at \(1, 0\).*expected -inf; 1 of 4"):
            assert_close_float64(wrong, expected, "lse")
    wrong = torch.where(expected == 0, -math.inf, expected)
    with pytest.raises(AssertionError, match=r"at \(0, 0\): got -inf"):
        assert_close_float64(wrong, expected, "lse")
    with pytest.raises(AssertionError, match="expected inf; 1 of 4"):
        assert_close_float64(-expected, -expected, "lse")
    with pytest.raises(AssertionError, match="expected float64, got torch.float32"):
        assert_close_float64(expected.float(), expected, "lse")
    with pytest.raises(AssertionError, match="is not"):
        assert_close_float64(expected[:1], expected, "lse")


def test_relative_errors():
    expected = torch.ones(4, dtype=torch.float64)
    assert math.isclose(relative_l2(expected * 1.5, expected), 0.5)
    assert relative_l2(expected * 0, expected * 0) == 0.0
    assert relative_l2(expected, expected * 0) == math.inf
    assert_close_relative(expected.float() * (1 + 1e-6), expected, "out")
    with pytest.raises(AssertionError, match="out: relative L2 error 1.*e-05 > 2e-06"):
        assert_close_relative(expected.float() * (1 + 1e-5), expected, "out")
    assert_as_good_as_one_device(expected * 1.2, expected * 1.2, expected, "dq")
    with pytest.raises(AssertionError, match="dq: relative L2 error 3.000e-01 is more than 1.25"):
        assert_as_good_as_one_device(expected * 1.3, expected * 1.2, expected, "dq")
    with pytest.raises(AssertionError):
        assert_close_relative(expected.float() * math.nan, expected, "out")
