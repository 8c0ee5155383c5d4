"""The decoder on ranks, in every layout, and against dense attention."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from nnscaler_ring.models import Transformer, TransformerConfig
from nnscaler_ring.models.rope import rope_rotation, rotate
from nnscaler_ring.models.self_attention import LAYOUTS
from tests.models.sharded import (
    assert_ranks_equal_one_device,
    contiguous_rows,
    make,
    zigzag_rows,
)

SIZES = {
    "vocab_size": 11,
    "width": 12,
    "num_layers": 2,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 4,
    "hidden": 10,
}


# What the ranks hold, and whether their work is balanced; every layout is in it.
WAYS = [("contiguous", False), ("contiguous", None), ("zigzag", True)]
assert {layout for layout, _ in WAYS} == set(LAYOUTS)


def build(process_group=None, **options):
    return Transformer(TransformerConfig(**{**SIZES, **options}), process_group=process_group)


def inputs(tokens: int):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(11, (2, tokens), generator=generator)
    return ids, torch.randn(2, tokens, 11, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("lens", [[6, 6], [5, 0, 8], [3, 4, 3]], ids=str)
@pytest.mark.parametrize(("layout", "balanced"), WAYS)
def test_ranks_equal_one_device(pool, layout, balanced, lens, window):
    tokens = sum(lens)
    rows = zigzag_rows(tokens, len(lens)) if layout == "zigzag" else contiguous_rows(lens)
    model = partial(build, layout=layout, balanced=balanced, window=window)
    assert_ranks_equal_one_device(pool, model, *inputs(tokens), rows)


def dense(model: Transformer, ids: torch.Tensor, window: int | None) -> torch.Tensor:
    tokens = ids.shape[1]
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    seen = (distance >= 0) & (distance <= (tokens if window is None else window))
    x = model.embedding(ids)
    rotation = rope_rotation(torch.arange(tokens)[None], 4, torch.float64)
    for layer in model.layers:
        attention = layer.attention
        y = layer.attention_norm(x)
        q, k, v = (
            linear(y).unflatten(-1, (-1, 4))
            for linear in (attention.to_q, attention.to_k, attention.to_v)
        )
        q, k, v = (z.transpose(1, 2) for z in (rotate(q, rotation), rotate(k, rotation), v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        x = x + attention.from_heads(out.transpose(1, 2).flatten(2))
        y, mlp = layer.feed_forward_norm(x), layer.feed_forward
        x = x + mlp.down(F.silu(mlp.gate(y)) * mlp.up(y))
    return model.head(model.norm(x))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("layout", "balanced"), WAYS)
def test_equals_dense_attention(layout, balanced, window):
    ids, _ = inputs(15)
    model = make(partial(build, layout=layout, balanced=balanced, window=window), None)
    expected = dense(model, ids, window)
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-10)


def test_norm_is_torch_s():
    model = make(build, None)
    x = torch.randn(3, 12, dtype=torch.float64)
    expected = F.rms_norm(x, (12,), model.norm.weight, eps=1e-6)
    torch.testing.assert_close(model.norm(x), expected, rtol=0, atol=1e-14)


def test_scores_depend_on_the_distance_of_positions_alone():
    ids, _ = inputs(9)
    model = make(build, None)
    near, far, odd = (
        torch.arange(9)[None] * step + start for step, start in [(1, 0), (1, 10**6), (2, 0)]
    )
    torch.testing.assert_close(model(ids, far), model(ids, near), rtol=0, atol=1e-7)
    assert (model(ids, odd) - model(ids, near)).abs().max() > 1e-3


def test_weights_do_not_depend_on_the_group(pool):
    torch.manual_seed(0)
    alone = build().state_dict()
    for state in pool.run(2, state_of_rank):
        assert all(torch.equal(state[name], alone[name]) for name in alone)


def state_of_rank(ranks):
    torch.manual_seed(0)
    return build(ranks, balanced=False).state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "striped"}, "layout must be one of"),
        ({"layout": "zigzag order"}, "zigzag chunks are now layout='zigzag', balanced=True"),
        ({"layout": "zigzag"}, "balanced must be True with layout='zigzag', got None"),
        ({"layout": "zigzag", "balanced": False}, "as in wrap_zigzag_attn_func; for contiguous"),
        ({"num_kv_heads": 4}, "num_kv_heads must divide num_heads, 6, got 4"),
        ({"head_dim": 3}, "head_dim must be even for RoPE, got 3"),
    ],
)
def test_wrong_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("chunks", [2, 5, 20])
def test_chunks_on_one_device_change_nothing(chunks, window):
    ids, dlogits = inputs(15)
    torch.manual_seed(0)
    whole = build(window=window).double()
    cut = Transformer(TransformerConfig(**SIZES, window=window), ring_size=chunks).double()
    cut.load_state_dict(whole.state_dict())
    for model in (whole, cut):
        (model(ids) * dlogits).sum().backward()
    torch.testing.assert_close(cut(ids), whole(ids), rtol=0, atol=1e-12)
    for mine, theirs in zip(cut.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-10)


def test_ring_size_is_the_group_s(pool):
    assert pool.run(2, wrong_ring_size) == ["ring_size must be the size of process_group, 2"] * 2


def wrong_ring_size(ranks):
    try:
        Transformer(TransformerConfig(**SIZES), ring_size=3, process_group=ranks)
    except ValueError as error:
        return str(error).partition(", got")[0]
