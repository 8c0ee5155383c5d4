"""A model on ranks that share the sequence, and the same model on one device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from nnscaler_ring.core.plan.layout import Zigzag
from nnscaler_ring.models import sum_gradients
from tests.ranks import RankPool
from tests.tolerances import assert_close_float64

Build = Callable[..., nn.Module]
"""(process_group) -> the model; any weights."""


@dataclass
class Result:
    """What a device has after a forward and a backward pass."""

    rows: list[int]  # of the whole sequence; empty for a result that every rank has
    out: Tensor
    dx: Tensor | None
    gradients: dict[str, Tensor]


def make(build: Build, process_group: Sequence[int] | None) -> nn.Module:
    """The same random float64 weights, biases and norms too, wherever it is built."""
    model = build(process_group=process_group).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return model


def run(
    ranks: Sequence[int] | None,
    build: Build,
    x: Tensor,
    dout: Tensor,
    lens: Sequence[int] | None = None,
    rows: Sequence[Sequence[int]] | None = None,
    block: int = 0,
) -> Result:
    """Forward and backward of `(out * dout).sum()` on one device.

    Args:
        x: the whole input, [batch, tokens, ...].
        dout: as the whole result; of a result without tokens every rank adds its part.
        lens: what is passed as shard_lens.
        rows: the rows of x that every block holds.
    """
    model = make(build, ranks)
    mine = list(rows[block]) if rows is not None else list(range(x.shape[1]))
    shard = x[:, mine]
    if x.is_floating_point():
        shard = shard.clone().requires_grad_()
    out = model(shard, shard_lens=lens)
    has_tokens = out.dim() == 3
    weights = dout[:, mine] if has_tokens else dout * (block + 1)
    (out * weights).sum().backward()
    sum_gradients(model, ranks)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Result(mine if has_tokens else [], out.detach(), shard.grad, gradients)


def run_on_rank(ranks: Sequence[int], *args: Any) -> Result:
    """`run` for this rank's block."""
    return run(ranks, *args, ranks.index(torch.distributed.get_rank()))


def contiguous_rows(lens: Sequence[int]) -> list[list[int]]:
    """The rows of contiguous shards."""
    return [list(range(sum(lens[:n]), sum(lens[: n + 1]))) for n in range(len(lens))]


def zigzag_rows(tokens: int, ranks: int) -> list[list[int]]:
    """The rows of zigzag shards."""
    return [list(chain(*Zigzag(tokens, ranks).positions(rank))) for rank in range(ranks)]


def assert_ranks_equal_one_device(
    pool: RankPool,
    build: Build,
    x: Tensor,
    dout: Tensor,
    rows: Sequence[Sequence[int]],
    *,
    ranks: Sequence[int] | None = None,
) -> None:
    """Results, input gradients and all parameter gradients in float64, within the one tolerance."""
    lens = [len(block) for block in rows]
    ranks = list(ranks or range(len(rows)))
    results = pool.run(None, run_on_rank, build, x, dout, lens, rows, ranks=ranks)
    shares = sum(range(1, len(rows) + 1))  # what the ranks' losses weigh together
    alone = run(None, build, x, dout if dout.dim() == 3 else dout * shares)
    assert set(alone.gradients) == {name for name, _ in make(build, None).named_parameters()}
    for rank, result in zip(ranks, results, strict=True):
        expected = alone.out[:, result.rows] if alone.out.dim() == 3 else alone.out
        assert_close_float64(result.out, expected, f"out of rank {rank}")
        mine = list(rows[ranks.index(rank)])
        if alone.dx is not None:
            assert_close_float64(result.dx, alone.dx[:, mine], f"dx of rank {rank}")
        assert set(result.gradients) == set(alone.gradients)
        for name, gradient in result.gradients.items():
            expected = alone.gradients[name]
            assert expected.abs().max() > 1e-3, f"{name}: nothing to compare"
            assert_close_float64(gradient, expected, f"{name} of rank {rank}")
