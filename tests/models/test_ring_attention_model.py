"""The Edifice model: structure, parameter count, chunks, and the last timestep on every rank."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from nnscaler_ring.models import RingAttentionModel
from tests.models.sharded import assert_ranks_equal_one_device, contiguous_rows, make, run

build = partial(RingAttentionModel.build, embed_dim=6, hidden_size=8, num_heads=2, num_layers=2)


def inputs(tokens: int):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, tokens, 6, generator=generator, dtype=torch.float64)
    return x, torch.randn(2, 8, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("embed_dim", "count"), [(288, 3_233_536), (256, 3_159_552)])
def test_parameter_count_is_edifice_s(embed_dim, count):
    model = RingAttentionModel.build(embed_dim=embed_dim)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model(torch.zeros(3, 60, embed_dim)).shape == (3, 256)


def test_output_size():
    assert RingAttentionModel.output_size(embed_dim=288) == 256
    assert RingAttentionModel.output_size(embed_dim=288, hidden_size=64) == 64


def dense(model: RingAttentionModel, x: torch.Tensor) -> torch.Tensor:
    x = model.input_projection(x)
    for block in model.blocks:
        q, k, v = (
            y.unflatten(-1, (2, 4)).transpose(1, 2)
            for y in block.qkv(block.attention_norm(x)).chunk(3, dim=-1)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + block.out_proj(out.transpose(1, 2).flatten(2))
        x = x + block.down(F.gelu(block.up(block.feed_forward_norm(x))))
    return model.norm(x)[:, -1]


@pytest.mark.parametrize("num_chunks", [None, 1, 2, 4, 7, 15])
def test_every_number_of_chunks_is_causal_attention(num_chunks):
    x, dout = inputs(15)
    model = partial(build, num_chunks=num_chunks, window_size=15)
    found = run(None, model, x, dout)
    torch.testing.assert_close(found.out, dense(make(model, None), x), rtol=0, atol=1e-10)
    one = run(None, partial(build, num_chunks=1, window_size=15), x, dout)
    for name, gradient in one.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("lens", [[5, 5], [4, 1, 5], [4, 6, 0]], ids=str)
def test_every_rank_gets_the_last_timestep(pool, lens):
    model = partial(build, window_size=10)
    assert_ranks_equal_one_device(pool, model, *inputs(10), contiguous_rows(lens))


def test_dropout_after_branches_and_between_blocks():
    model = build(window_size=10, dropout=0.5)
    x = torch.randn(1, 10, 6)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))
    rates = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert rates == [0.5] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 0}, "embed_dim must be an int of at least 1, got 0"),
        ({"num_heads": 3}, "num_heads must divide hidden_size, 8, got 3"),
        ({"num_chunks": 0}, "num_chunks must be an int of at least 1 or None, got 0"),
        ({"num_chunks": 61}, "num_chunks must not exceed window_size, 60, got 61"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_window_size_is_the_length():
    with pytest.raises(
        ValueError, match="window_size must be the length of the sequence, 59, got 60"
    ):
        build()(torch.zeros(1, 59, 6))
