"""`RingAttention` is causal attention, cut into any number of chunks, on any number of ranks."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from nnscaler_ring.models import RingAttention, sum_gradients
from tests.models.sharded import assert_ranks_equal_one_device, contiguous_rows, make, run
from tests.ranks import RankFailure
from tests.tolerances import assert_close_float64

build = partial(RingAttention, 12, 3)


def inputs(tokens: int, width: int = 12):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, tokens, width, generator=generator, dtype=torch.float64) for _ in "xd")


def dense(model: RingAttention, x: torch.Tensor) -> torch.Tensor:
    heads = [
        linear(x).unflatten(-1, (model.n_heads, -1)).transpose(1, 2)
        for linear in (model.w_q, model.w_k, model.w_v)
    ]
    out = F.scaled_dot_product_attention(*heads, is_causal=model.causal)
    return model.w_o(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("ring_size", [None, 1, 2, 3, 5, 17, 20])
def test_any_number_of_chunks_is_dense_attention(ring_size, causal):
    x, dout = inputs(17)
    chunked = partial(build, ring_size, causal=causal)
    found = run(None, chunked, x, dout)
    model = make(build, None)
    model.causal = causal
    leaf = x.clone().requires_grad_()
    out = dense(model, leaf)
    (out * dout).sum().backward()
    assert_close_float64(found.out, out, "out")
    assert_close_float64(found.dx, leaf.grad, "dx")
    for name, parameter in model.named_parameters():
        assert_close_float64(found.gradients[name], parameter.grad, name)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lens", [[6, 6], [5, 0, 8], [1, 7, 2]], ids=str)
def test_ranks_equal_one_device(pool, lens, causal):
    x, dout = inputs(sum(lens))
    rows = contiguous_rows(lens)
    assert_ranks_equal_one_device(pool, partial(build, causal=causal), x, dout, rows)


def test_block_order_is_the_group_s(pool):
    x, dout = inputs(9)
    rows = contiguous_rows([4, 2, 3])
    assert_ranks_equal_one_device(pool, build, x, dout, rows, ranks=[2, 0, 1])


@pytest.mark.parametrize("ring_size", [None, 4])
def test_weights_of_a_row_sum_to_one(ring_size):
    # The document's own step adds up the softmax of every block: rows then sum to their number.
    model = RingAttention(8, 2, ring_size).double()
    with torch.no_grad():
        model.w_v.weight.zero_()
        model.w_o.weight.copy_(torch.eye(8))
    model.w_v.bias = torch.nn.Parameter(torch.ones(8, dtype=torch.float64))
    out = model(torch.randn(1, 13, 8, dtype=torch.float64))
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-12)


def dropped(ranks, ring_size, lens):
    """Result and weight gradients with dropout of probabilities, from the same seed everywhere."""
    model = make(partial(build, ring_size, dropout_p=0.4), ranks).train()
    x, dout = inputs(sum(lens))
    block = 0 if ranks is None else ranks.index(torch.distributed.get_rank())
    rows = contiguous_rows(lens)[block] if ranks else list(range(sum(lens)))
    torch.manual_seed(5)
    out = model(x[:, rows], None if ranks is None else lens)
    (out * dout[:, rows]).sum().backward()
    sum_gradients(model, ranks)
    return out.detach(), model.w_q.weight.grad, model.w_v.weight.grad


def test_dropout_is_the_same_in_chunks_and_on_ranks(pool):
    lens = [5, 3, 6]
    one = dropped(None, None, lens)
    for name, found, expected in zip(
        ("out", "w_q", "w_v"), dropped(None, 4, lens), one, strict=True
    ):
        assert_close_float64(found, expected, f"{name} in chunks")
    results = pool.run(3, dropped, None, lens)
    assert_close_float64(torch.cat([out for out, _, _ in results], dim=1), one[0], "out on ranks")
    for _, w_q, w_v in results:
        assert_close_float64(w_q, one[1], "w_q on ranks")
        assert_close_float64(w_v, one[2], "w_v on ranks")
    x, _ = inputs(14)
    kept = make(partial(build, dropout_p=0.4), None)
    assert (kept(x) - one[0]).abs().max() > 1e-3  # not in evaluation
    assert torch.equal(kept(x), make(build, None)(x))


def test_the_future_is_not_seen():
    x, _ = inputs(14)
    model = make(partial(build, 3), None)
    changed = x.clone()
    changed[:, 9:] += 1
    torch.testing.assert_close(model(changed)[:, :9], model(x)[:, :9], rtol=0, atol=0)
    assert (model(changed)[:, 9:] - model(x)[:, 9:]).abs().min() > 0


def test_weights_do_not_depend_on_the_ring():
    states = []
    for ring_size in (None, 4):
        torch.manual_seed(3)
        states.append(RingAttention(8, 2, ring_size).state_dict())
    assert [*states[0]] == ["w_q.weight", "w_k.weight", "w_v.weight", "w_o.weight"]
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name])


def test_segments_must_fill_the_sequence():
    model = RingAttention(8, 2, ring_size=4, segment_size=2190)
    message = (
        r"segment_size \* ring_size = 2190 \* 4 must be the length .* 8760 .* got 35040; leave"
    )
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(1, 35040, 8))
    assert RingAttention(8, 2, 4, 3)(torch.zeros(1, 12, 8)).shape == (1, 12, 8)


def segments(ranks: list[int], tokens: list[int]) -> tuple[int, ...]:
    model = RingAttention(8, 2, segment_size=5, process_group=ranks)
    return tuple(model(torch.zeros(1, tokens[ranks.index(torch.distributed.get_rank())], 8)).shape)


def test_segments_are_the_ranks_shards(pool):
    assert pool.run(2, segments, [5, 5]) == [(1, 5, 8)] * 2


def test_a_wrong_segment_is_told_to_all_ranks(pool):
    with pytest.raises(RankFailure) as failure:
        pool.run(None, segments, [5, 6], ranks=[0, 2])
    told, own = str(failure.value).split("--- rank 2 ---")
    assert "must hold 5 tokens, got 6" in own
    assert "must hold 5 tokens, got 6" in told and "rank 2" in told


def ring_of_three(ranks: list[int]) -> None:
    RingAttention(8, 2, ring_size=3, process_group=ranks)


def test_ring_size_is_the_size_of_the_group(pool):
    with pytest.raises(RankFailure, match="ring_size must be the size of process_group, 2, got 3"):
        pool.run(2, ring_of_three)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_heads": 3}, "n_heads must divide d_model, got n_heads=3 and d_model=8"),
        ({"ring_size": 0}, "ring_size must be an int of at least 1 or None, got 0"),
        ({"ring_size": 2.0}, "ring_size must be an int of at least 1 or None, got 2.0"),
        ({"segment_size": 0}, "segment_size must be at least 1 or None, got 0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RingAttention(**{"d_model": 8, "n_heads": 2, **arguments})
