"""RingTransformer: ranks against one device, with the loss across the ends of shards."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from nnscaler_ring.dilated import RingTransformer
from nnscaler_ring.dilated.ring_transformer import NO_LABEL, next_token_loss, next_tokens
from nnscaler_ring.models import sum_gradients
from tests.models.sharded import make
from tests.tolerances import assert_close_float64

VOCABULARY = 11
build = partial(
    RingTransformer,
    VOCABULARY,
    12,
    6,
    2,
    20,
    segment_lengths=[4, 9],
    dilation_rates=[1, 2],
    num_kv_heads=2,
)


def ids_of(tokens):
    return torch.randint(VOCABULARY, (2, tokens), generator=torch.Generator().manual_seed(0))


def train(ranks, lens):
    """Labels and all gradients of a rank."""
    model = make(build, ranks)
    block = 0 if ranks is None else ranks.index(dist.get_rank())
    start = sum(lens[:block])
    ids = ids_of(sum(lens))[:, start : start + lens[block]]
    labels = next_tokens(ids, ranks, lens)
    loss = next_token_loss(model(ids, lens), labels, 2 * (sum(lens) - 1))
    loss.backward()
    sum_gradients(model, ranks)
    return labels, loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("lens", [[7, 0, 6], [5, 5]], ids=str)
def test_ranks_equal_one_device(pool, lens):
    tokens = sum(lens)
    labels, loss, gradients = train(None, [tokens])
    ids = ids_of(tokens)
    assert torch.equal(labels[:, :-1], ids[:, 1:]) and labels[:, -1].eq(NO_LABEL).all()
    dense = F.cross_entropy(make(build, None)(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_close_float64(loss, dense, "loss")
    results = pool.run(len(lens), train, lens)
    assert torch.equal(torch.cat([found for found, _, _ in results], dim=1), labels)
    assert_close_float64(sum(part for _, part, _ in results), loss, "sum of losses")
    for rank, (_, _, found) in enumerate(results):
        for name, gradient in gradients.items():
            assert_close_float64(found[name], gradient, f"{name} on rank {rank}")


def test_ranks_in_any_order(pool):
    """Block i is on the i-th rank of the list."""
    labels, _, _ = train(None, [9])
    results = pool.run(None, train, [4, 3, 2], ranks=[2, 0, 1])
    assert torch.equal(torch.cat([found for found, _, _ in results], dim=1), labels)


def test_too_long():
    with pytest.raises(ValueError, match="at most max_seq_len=20 tokens, got 21"):
        build()(ids_of(21))
