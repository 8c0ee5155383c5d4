"""Options one by one: what the generated contract cannot see."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler_ring import DropoutSeed, wrap_ring_attn_func, wrap_ring_attn_varlen_func
from nnscaler_ring.core.scores.dropout import Dropout
from tests.oracle import dropout_factors, make_qkv

HEADS = 4


def qkv(tokens: int = 12, batch: int = 2, heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    return make_qkv(1, batch, tokens, tokens, heads, heads, 4)


# Dropout.


def factors(p: float, seed: int, nq: int = 64, nk: int = 64, heads: int = 2) -> Tensor:
    dropout = Dropout(p, torch.tensor(seed), 0, 0)
    return dropout.factors(2, heads, torch.arange(nq), torch.arange(nk), torch.float64)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_the_mask_is_the_documented_hash(seed):
    expected = dropout_factors(0.3, seed, 2, 2, 9, 11)
    assert torch.equal(factors(0.3, seed, 9, 11), expected)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_as_many_are_dropped_as_asked_for(p):
    dropped = (factors(p, 3, 256, 256) == 0).to(torch.float64)
    # 2 * 2 * 256 * 256 draws: five standard deviations.
    spread = 5 * (p * (1 - p)) ** 0.5
    assert abs(dropped.mean() - p) < spread / dropped.numel() ** 0.5
    for dim in (0, 1, 2, 3):  # neither of a row, a column, a head nor a batch row
        others = [d for d in range(4) if d != dim]
        means = dropped.mean(others)
        limit = 1.2 * spread * (dropped.shape[dim] / dropped.numel()) ** 0.5
        assert bool(((means - p).abs() < limit).all()), dim


def test_neighbours_and_seeds_are_independent():
    first = factors(0.5, 7, 256, 256)[0, 0] - 1
    others = {
        "next key": (first[:, :-1], first[:, 1:]),
        "next query": (first[:-1], first[1:]),
        "diagonal": (first[:-1, :-1], first[1:, 1:]),
        "next seed": (first, factors(0.5, 8, 256, 256)[0, 0] - 1),
        "next head": (first, factors(0.5, 7, 256, 256)[0, 1] - 1),
        "next batch row": (first, factors(0.5, 7, 256, 256)[1, 0] - 1),
    }
    for name, (x, y) in others.items():
        assert abs((x * y).mean()) < 5 / x.numel() ** 0.5, name


def with_other_seeds(ranks: list[int], given: bool) -> str:
    """On one rank: what a call with a seed of its own says."""
    block = ranks.index(dist.get_rank())
    q, k, v = qkv(4)
    try:
        wrap_ring_attn_func(
            q,
            k,
            v,
            dropout_p=0.5,
            dropout_seed=10 + block if given else None,
            process_group=ranks,
        )
    except ValueError as error:
        return str(error)
    return ""


def test_given_seeds_must_be_the_same(pool):
    for message in pool.run(3, with_other_seeds, True):
        assert "dropout_seed must be the same on all ranks" in message
        assert "{0: 10, 1: 11, 2: 12} by rank" in message


def with_drawn_seed(ranks: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """On one rank, whose generator is its own: its rows, and what it would draw next."""
    block = ranks.index(dist.get_rank())
    torch.manual_seed(100 + block)
    rows = slice(4 * block, 4 * block + 4)
    q, k, v = (x[:, rows].clone().requires_grad_() for x in qkv())
    out = wrap_ring_attn_func(q, k, v, dropout_p=0.5, process_group=ranks)
    (dq,) = torch.autograd.grad(out.square().sum(), q)
    return out.detach(), dq, torch.rand(1)


def test_a_drawn_seed_is_the_first_rank_s(pool):
    """Equal to one device with that rank's generator; every generator has moved by one draw."""
    shards = pool.run(None, with_drawn_seed, ranks=[2, 0, 1])
    torch.manual_seed(100)
    q, k, v = (x.requires_grad_() for x in qkv())
    out = wrap_ring_attn_func(q, k, v, dropout_p=0.5)
    (dq,) = torch.autograd.grad(out.square().sum(), q)
    for block, (some, some_dq, _) in enumerate(shards):
        torch.testing.assert_close(some, out[:, 4 * block : 4 * block + 4])
        torch.testing.assert_close(some_dq, dq[:, 4 * block : 4 * block + 4])
    assert torch.equal(shards[0][2], torch.rand(1))


def test_parts_of_batch_and_heads_drop_what_the_whole_drops():
    q, k, v = qkv()
    whole = wrap_ring_attn_func(q, k, v, dropout_p=0.4, dropout_seed=5)
    for b, h in itertools.product((0, 1), (0, 2)):
        part = [x[b : b + 1, :, h : h + 2] for x in (q, k, v)]
        seed = DropoutSeed(5, first_batch=b, first_head=h)
        out = wrap_ring_attn_func(*part, dropout_p=0.4, dropout_seed=seed)
        torch.testing.assert_close(out, whole[b : b + 1, :, h : h + 2])


def test_a_loss_of_dropout_has_exact_gradients():
    q, k, v = (x.requires_grad_() for x in qkv(5, 1, 2))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return wrap_ring_attn_func(q, k, v, dropout_p=0.4, dropout_seed=9)

    assert torch.autograd.gradcheck(attention, (q, k, v))


# Rows that see nothing.

EVERYTHING: dict[str, Any] = {
    "softcap": 2.0,
    "alibi_slopes": torch.rand(HEADS),
    "dropout_p": 0.3,
    "dropout_seed": 1,
}


@pytest.mark.parametrize("kernel", ["torch_cpu", "reference"])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 3.0, -torch.inf])], ids=str)
def test_documents_without_keys(kernel, sinks):
    """Queries without any key: 0, -inf or the sink's logit, zero and finite gradients."""
    q, k, v = make_qkv(2, None, 7, 5, HEADS, HEADS, 4)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    bias = torch.zeros(HEADS, 7, 5, requires_grad=True)
    sinks = None if sinks is None else sinks.clone().requires_grad_()
    cu_q, cu_k = torch.tensor([0, 3, 7]), torch.tensor([0, 0, 5])
    out, lse = wrap_ring_attn_varlen_func(
        q, k, v, cu_q, cu_k, bias, sinks=sinks, kernel=kernel, return_lse=True, **EVERYTHING
    )
    blind = torch.full((HEADS,), -torch.inf) if sinks is None else sinks.detach()
    assert torch.equal(out[:3], torch.zeros_like(out[:3]))
    assert torch.equal(lse[:, :3], blind.unsqueeze(1).expand(-1, 3).to(lse.dtype))
    wanted = [x for x in (q, k, v, bias, sinks) if x is not None]
    grads = torch.autograd.grad(out.sum() + lse[:, 3:].sum(), wanted)
    assert all(bool(torch.isfinite(grad).all()) for grad in grads)
    assert torch.equal(grads[0][:3], torch.zeros(3, HEADS, 4, dtype=grads[0].dtype))


@pytest.mark.parametrize("kernel", ["torch_cpu", "reference"])
def test_a_bias_may_hide_every_key_of_a_row(kernel):
    q, k, v = (x.requires_grad_() for x in qkv(6, 1, 2))
    bias = torch.zeros(1, 1, 6, 6)
    bias[..., 2, :] = -torch.inf
    bias.requires_grad_()
    out, lse = wrap_ring_attn_func(q, k, v, bias=bias, kernel=kernel, return_lse=True)
    assert torch.equal(out[:, 2], torch.zeros_like(out[:, 2]))
    assert bool((lse[..., 2] == -torch.inf).all())
    for grad in torch.autograd.grad(out.square().sum(), (q, k, v, bias)):
        assert bool(torch.isfinite(grad).all())


# Bits.


def repeated(ranks: list[int]) -> bool:
    """On one rank: whether two runs with every option are bitwise equal."""
    block = ranks.index(dist.get_rank())
    runs = []
    for _ in range(2):
        q, k, v = (x.float().requires_grad_() for x in make_qkv(block, 1, 300, 300, HEADS, 2, 16))
        bias = torch.zeros(1, HEADS, 300, 600, requires_grad=True)
        sinks = torch.zeros(HEADS, requires_grad=True)
        out, lse = wrap_ring_attn_func(
            q,
            k,
            v,
            bias=bias,
            sinks=sinks,
            deterministic=True,
            return_lse=True,
            process_group=ranks,
            **EVERYTHING,
        )
        inputs = (q, k, v, bias, sinks)
        runs.append([out, lse, *torch.autograd.grad(out.sum() + lse.sum(), inputs)])
    return all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_deterministic_repeats_its_bits(pool):
    assert all(pool.run(2, repeated))


def test_options_in_blocks_build_no_whole_score_matrix():
    """2048 tokens of 4 heads: 64 MiB of scores in float32; a block is at most 4."""
    q, k, v = (x.float() for x in make_qkv(1, 1, 2048, 2048, HEADS, HEADS, 8))
    with torch.profiler.profile(profile_memory=True) as profile:
        wrap_ring_attn_func(q, k, v, softcap=5.0, dropout_p=0.1, kernel="torch_cpu")
    events = profile.profiler.kineto_results.events()
    assert max(e.nbytes() for e in events if e.name() == "[memory]") <= 8 * 2**20


@pytest.mark.parametrize("head_dims", [(256, 256), (192, 128)], ids=str)
def test_large_heads(head_dims):
    """256, and DeepSeek's 192 of q and k beside 128 of v."""
    d, dv = head_dims
    q, k, v = make_qkv(3, 1, 40, 40, 2, 1, d, dv)
    one = wrap_ring_attn_func(q, k, v, kernel="torch_cpu")
    other = wrap_ring_attn_func(q, k, v, kernel="reference")
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
