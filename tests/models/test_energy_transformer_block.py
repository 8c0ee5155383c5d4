"""The block on ranks, its formula, and its dropout."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from nnscaler_ring.models import EnergyTransformerBlock
from tests.models.sharded import assert_ranks_equal_one_device, contiguous_rows, make
from tests.models.test_ring_attention import dense, inputs

build = partial(EnergyTransformerBlock, 12, 3, 20)


@pytest.mark.parametrize("lens", [[6, 6], [5, 1, 7]], ids=str)
def test_ranks_equal_one_device(pool, lens):
    x, dout = inputs(sum(lens))
    assert_ranks_equal_one_device(pool, build, x, dout, contiguous_rows(lens))


@pytest.mark.parametrize("ring_size", [None, 4])
def test_is_pre_norm_attention_and_gelu(ring_size):
    x, _ = inputs(13)
    model = make(partial(build, ring_size), None)
    expected = x + dense(model.attention, model.attention_norm(x))
    hidden = F.gelu(F.linear(model.feed_forward_norm(expected), model.up.weight, model.up.bias))
    expected = expected + F.linear(hidden, model.down.weight, model.down.bias)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_dropout_rate_is_honoured():
    x = torch.zeros(1, 2000, 12)
    block = EnergyTransformerBlock(12, 3, 20, dropout_rate=0.4)
    with torch.no_grad():
        block.down.weight.zero_()
        block.down.bias.fill_(1.0)
    out = block(x)
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert (out == 0).float().mean() == pytest.approx(0.4, abs=0.02)
    assert (block.eval()(x) == 1).all()
