"""What a ring of `RingAttention` sends: keys and values, as few as the mask allows, never q."""

from dataclasses import asdict

import pytest
import torch
import torch.distributed as dist

from nnscaler_ring import traffic
from nnscaler_ring.models import RingAttention, sum_gradients

WIDTH, TOKENS, BYTES = 12, 5, 8  # of each shard; float64
SHARD = 2 * TOKENS * WIDTH * BYTES  # one shard of K and of V


def sent(ranks, exchange, causal):
    """Forward and backward traffic of this rank, in a group of its own."""
    layer = RingAttention(WIDTH, 3, causal=causal, exchange=exchange, process_group=ranks).double()
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64)
    before = traffic(ranks)
    out = layer(x)
    between = traffic(ranks)
    out.sum().backward()
    return asdict(between - before), asdict(traffic(ranks) - between)


@pytest.mark.parametrize("ranks", [[0, 1], [2, 0, 1]], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_direct_sends_what_is_read(pool, ranks, causal):
    results = pool.run(None, sent, "direct", causal, ranks=ranks)
    for block, (forward, backward) in enumerate(results):
        readers = len(ranks) - 1 - block if causal else len(ranks) - 1
        assert forward["forward_kv_bytes"] == readers * SHARD
        assert backward["backward_kv_bytes"] == readers * SHARD
        read = block if causal else len(ranks) - 1
        assert backward["gradient_bytes"] == read * SHARD
        assert forward["relayout_bytes"] == backward["relayout_bytes"] == 0


@pytest.mark.parametrize("ranks", [[0, 1], [2, 0, 1]], ids=str)
def test_ring_sends_every_shard_around(pool, ranks):
    for forward, backward in pool.run(None, sent, "ring", True, ranks=ranks):
        hops = len(ranks) - 1
        assert forward["forward_kv_bytes"] == backward["backward_kv_bytes"] == hops * SHARD
        assert backward["gradient_bytes"] == hops * SHARD
        assert forward["messages"] > 0


def gradients_sum(ranks):
    """A parameter that only one rank uses, and one that none does."""
    model = torch.nn.ModuleList(torch.nn.Linear(2, 1, bias=False) for _ in range(3))
    first = dist.get_rank() == ranks[0]
    (model[0] if first else model[1])(torch.ones(1, 2)).sum().backward()
    sum_gradients(model, ranks)
    return [None if layer.weight.grad is None else layer.weight.grad.tolist() for layer in model]


def test_gradients_of_layers_that_only_some_ranks_use(pool):
    expected = [[[1.0, 1.0]], [[2.0, 2.0]], None]
    assert pool.run(3, gradients_sum) == [expected] * 3
