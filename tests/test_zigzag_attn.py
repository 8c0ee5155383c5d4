"""Moving a model's tensors to zigzag order and back, on real ranks."""

import itertools
import random

import pytest
import torch

from nnscaler_ring import (
    wrap_zigzag_attn_func,
    zigzag_positions,
    zigzag_shard,
    zigzag_unshard,
)
from tests.core.plan.test_layout import contiguous_tokens, zigzag_tokens
from tests.oracle import make_qkv

DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
)


def everything(total: int, shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor whose dimension `dim` holds all tokens, with the other sizes from `shape`."""
    sizes = [*shape]
    sizes.insert(dim % (len(shape) + 1), total)
    numbers = torch.arange(torch.Size(sizes).numel()).remainder(2 if dtype == torch.bool else 251)
    return numbers.reshape(sizes).to(dtype)


def pick(x: torch.Tensor, dim: int, tokens: list[int]) -> torch.Tensor:
    return x.index_select(dim, torch.tensor(tokens, dtype=torch.int64))


def round_trips(ranks, cases):
    """On one rank, per case: x in zigzag order, and back."""
    block = ranks.index(torch.distributed.get_rank())
    results = []
    for lens, shape, dim, dtype in cases:
        x = pick(everything(sum(lens), shape, dim, dtype), dim, contiguous_tokens(lens)[block])
        shard_lens = None if len(set(lens)) == 1 else lens
        there = zigzag_shard(x, ranks, dim=dim, shard_lens=shard_lens)
        back = zigzag_unshard(there, ranks, dim=dim, shard_lens=shard_lens)
        results.append((there, back))
    return results


SHARDS = {
    2: ([4, 4], [3, 3], [1, 1], [5, 2], [0, 7], [0, 1], [0, 0]),
    3: ([6, 6, 6], [5, 5, 5], [1, 1, 1], [7, 0, 3], [0, 0, 11]),
    4: ([4, 4, 4, 4], [1, 1, 1, 1], [9, 1, 0, 2], [0, 3, 0, 0]),
}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_there_and_back(pool, size):
    rng = random.Random(size)
    cases = [
        (lens, *way, dtype)
        for lens, way, dtype in itertools.product(
            SHARDS[size],
            (((2, 3), 1), ((), 0), ((2, 3), -1), ((3,), 0), ((2, 0), 1)),
            rng.sample(DTYPES, 3) if size > 2 else DTYPES,
        )
    ]
    shards = pool.run(size, round_trips, cases)
    for number, (lens, shape, dim, dtype) in enumerate(cases):
        x = everything(sum(lens), shape, dim, dtype)
        for block, (there, back) in enumerate(shard[number] for shard in shards):
            assert there.dtype == back.dtype == dtype
            assert torch.equal(there, pick(x, dim, zigzag_tokens(lens)[block])), cases[number]
            assert torch.equal(back, pick(x, dim, contiguous_tokens(lens)[block])), cases[number]


def gradients(ranks, cases):
    """On one rank: the gradients of x through shard, and through unshard, for known ones."""
    block = ranks.index(torch.distributed.get_rank())
    found = []
    for lens, dtype in cases:
        shard_lens = None if len(set(lens)) == 1 else lens
        weights = everything(sum(lens), (2, 3), 1, dtype)
        held, moved = contiguous_tokens(lens)[block], zigzag_tokens(lens)[block]
        x = torch.zeros(2, len(held), 3, dtype=dtype, requires_grad=True)
        y = torch.zeros(2, len(moved), 3, dtype=dtype, requires_grad=True)
        zigzag_shard(x, ranks, shard_lens=shard_lens).backward(pick(weights, 1, moved))
        zigzag_unshard(y, ranks, shard_lens=shard_lens).backward(pick(weights, 1, held))
        summed = torch.zeros(2, len(held), 3, dtype=dtype, requires_grad=True)
        zigzag_shard(summed, ranks, shard_lens=shard_lens).sum().backward()  # strides are 0
        found.append((x.grad, y.grad, summed.grad))
    return found


@pytest.mark.parametrize("size", [2, 3, 4])
def test_gradients_go_the_other_way(pool, size):
    cases = list(itertools.product(SHARDS[size], (torch.float64, torch.bfloat16)))
    shards = pool.run(size, gradients, cases)
    for number, (lens, dtype) in enumerate(cases):
        weights = everything(sum(lens), (2, 3), 1, dtype)
        for block, (dx, dy, ones) in enumerate(shard[number] for shard in shards):
            assert torch.equal(dx, pick(weights, 1, contiguous_tokens(lens)[block])), lens
            assert torch.equal(dy, pick(weights, 1, zigzag_tokens(lens)[block])), lens
            assert torch.equal(ones, torch.ones_like(dx))


def second_gradient(ranks):
    """gradcheck and gradgradcheck of the whole way, on both ranks at the same time."""
    x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    dx = torch.randn_like(x, requires_grad=True)
    moved = zigzag_shard(x, ranks, dim=0)
    (once,) = torch.autograd.grad(moved, x, zigzag_shard(dx, ranks, dim=0), create_graph=True)
    (twice,) = torch.autograd.grad(once.square().sum(), dx)
    return torch.equal(once, dx), torch.equal(twice, 2 * dx)


def test_the_gradient_has_a_gradient(pool):
    assert pool.run(2, second_gradient) == [(True, True)] * 2


def positions(ranks, totals):
    return [zigzag_positions(total, ranks) for total in totals]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_positions_are_the_tokens_that_a_rank_holds(pool, size):
    totals = [0, 1, 2, 5, 8, 24, 25, 31]
    for block, found in enumerate(pool.run(size, positions, totals)):
        for total, tokens in zip(totals, found, strict=True):
            lens = [total] + [0] * (size - 1)
            assert tokens.tolist() == zigzag_tokens(lens)[block]
            assert tokens.dtype == torch.int64


@pytest.mark.parametrize("move", [zigzag_shard, zigzag_unshard])
def test_one_device_moves_nothing(move):
    x = torch.randn(2, 5, 3)
    assert move(x) is x
    assert zigzag_positions(5).tolist() == [0, 1, 2, 3, 4]
    assert zigzag_positions(5, device="meta").device.type == "meta"


def stay_in_zigzag_order(ranks, lens):
    """Shard once, two layers in zigzag order, unshard once; and the layers one by one."""
    block = ranks.index(torch.distributed.get_rank())
    x = everything(sum(lens), (1, 2, 4), 1, torch.float64) / 251 - 0.5
    x = pick(x, 1, contiguous_tokens(lens)[block])
    results = []
    for layout in ("zigzag", "contiguous"):
        start = x.clone().requires_grad_()
        h, own = start, lens
        if layout == "zigzag":
            h = zigzag_shard(start, ranks, shard_lens=lens)
            own = [len(tokens) for tokens in zigzag_tokens(lens)]
        for _ in range(2):
            h = h + wrap_zigzag_attn_func(
                h, h, h, process_group=ranks, layout=layout, shard_lens=own
            )
        if layout == "zigzag":
            h = zigzag_unshard(h, ranks, shard_lens=lens)
        h.square().sum().backward()
        results.append((h.detach(), start.grad))
    return results


@pytest.mark.parametrize("lens", [[8, 8], [3, 6], [5, 0, 8], [3, 3, 3, 3]], ids=str)
def test_layers_in_zigzag_order_equal_layers_in_contiguous_order(pool, lens):
    for zigzag, contiguous in pool.run(len(lens), stay_in_zigzag_order, lens):
        for one, other in zip(zigzag, contiguous, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("move", [zigzag_shard, zigzag_unshard])
def test_wrong_dims_are_refused(move):
    with pytest.raises(ValueError, match="dim must be a dimension of x"):
        move(torch.randn(2, 3), dim=2)
    with pytest.raises(TypeError, match="x must be a tensor"):
        move([1, 2])
    with pytest.raises(TypeError, match="dim must be an int"):
        move(torch.randn(2, 3), dim=1.0)


def test_wrong_positions_and_layouts_are_refused():
    with pytest.raises(ValueError, match="total_tokens must be >= 0, got -1"):
        zigzag_positions(-1)
    x = torch.randn(1, 4, 2, 4)
    with pytest.raises(ValueError, match="layout must be 'contiguous' or 'zigzag', got 'striped'"):
        wrap_zigzag_attn_func(x, x, x, layout="striped")


def losses_that_differ(ranks: list[int]) -> str:
    """On one rank: the error, where the first rank's loss alone uses the lse."""
    q, k, v = (x.requires_grad_() for x in make_qkv(1, 1, 4, 4, 2, 2, 4))
    out, lse = wrap_zigzag_attn_func(q, k, v, return_lse=True, process_group=ranks)
    loss = out.sum() + (lse.sum() if torch.distributed.get_rank() == 0 else 0.0)
    try:
        loss.backward()
    except ValueError as error:
        return str(error)
    return ""


def test_losses_that_use_the_lse_on_some_ranks_are_refused(pool):
    """Its rows move with those of the gradient: a rank without them would be waited for."""
    for message in pool.run(2, losses_that_differ):
        assert "whether the loss uses softmax_lse (add 0.0 * softmax_lse" in message
