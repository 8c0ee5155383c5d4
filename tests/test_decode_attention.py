"""decode_attention over caches on several ranks, and merge_attention, equal dense attention."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler_ring import decode_attention, merge_attention, set_agreement_timeout, traffic
from nnscaler_ring.core.ranks.groups import group_state, group_string
from tests.oracle import Mods, dense_attention, make_qkv
from tests.tolerances import assert_close_float64, assert_close_relative

HEADS, KV_HEADS, DIM, V_DIM = 6, 2, 8, 5
LENS = [[4, 0, 7], [1, 2, 0], [0, 0, 1], [9, 3, 5]]  # of a request on each rank
CAPACITY = 10

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window_size": (3, 0)},
    "window of both sides": {"window_size": (2, 5)},
    "all": {
        "window_size": (6, -1),
        "softcap": 2.0,
        "softmax_scale": 0.7,
        "alibi_slopes": torch.linspace(0.1, 0.6, HEADS, dtype=torch.float64),
        "sinks": torch.linspace(-1.0, 1.0, HEADS, dtype=torch.float64),
    },
    "slopes of each request": {
        "alibi_slopes": torch.rand(
            len(LENS), HEADS, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        ),
    },
}


def request(number: int, t: int) -> tuple[Tensor, Tensor, Tensor]:
    """The whole q, k, v of one request, packed."""
    total = sum(LENS[number])
    _, k, v = make_qkv(number, None, 1, total, HEADS, KV_HEADS, DIM, V_DIM)
    q, _, _ = make_qkv(100 + number, None, t, 1, HEADS, KV_HEADS, DIM, V_DIM)
    return q, k, v


def dense(t: int, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Out and lse of all requests by dense attention."""
    outs, lses = [], []
    left = options.get("window_size", (-1, -1))[0]
    for number, lens in enumerate(LENS):
        slopes = options.get("alibi_slopes")
        mods = Mods(
            softcap=options.get("softcap", 0.0),
            alibi_slopes=slopes[number] if slopes is not None and slopes.dim() == 2 else slopes,
            sinks=options.get("sinks"),
        )
        out, lse = dense_attention(
            *request(number, t),
            softmax_scale=options.get("softmax_scale"),
            causal=True,
            window_size=(left, 0),
            cu_seqlens_q=[0, t],
            cu_seqlens_k=[0, sum(lens)],
            mods=mods,
        )
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses)


def cache_of(block: int | None, spread: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A rank's rows of K and V, how many are in use, and their positions.

    `spread`: key n lies on rank n % 3 instead of in block order. Rows that are not in use are NaN.
    """
    capacity = CAPACITY if block is not None else 20
    k = torch.full((len(LENS), capacity, KV_HEADS, DIM), torch.nan, dtype=torch.float64)
    v = torch.full((len(LENS), capacity, KV_HEADS, V_DIM), torch.nan, dtype=torch.float64)
    positions = torch.full((len(LENS), capacity), 99)
    lens = []
    for number, shares in enumerate(LENS):
        _, whole_k, whole_v = request(number, 1)
        rows = torch.arange(sum(shares))
        if block is not None and spread:
            rows = rows[rows % 3 == block].flip(0)
        elif block is not None:
            start = sum(shares[:block])
            rows = rows[start : start + shares[block]]
        lens.append(len(rows))
        k[number, : len(rows)], v[number, : len(rows)] = whole_k[rows], whole_v[rows]
        positions[number, : len(rows)] = rows
    return k, v, torch.tensor(lens), positions


def decode(
    ranks: list[int] | None, t: int, name: str, spread: bool, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Out and lse of all requests on this rank."""
    block = None
    if ranks is not None:
        set_agreement_timeout(dist.group.WORLD, 25.0)
        block = ranks.index(dist.get_rank())
    k, v, lens, positions = cache_of(block, spread)
    q = torch.stack([request(number, t)[0] for number in range(len(LENS))])
    options = {
        key: value.to(dtype) if isinstance(value, Tensor) else value
        for key, value in OPTIONS[name].items()
    }
    more = {"key_positions": positions} if spread else {}
    out, lse = decode_attention(
        *(x.to(dtype) for x in (q, k, v)), lens, ranks, **options, **more, return_lse=True
    )
    assert out.dtype == dtype
    return out, lse


@pytest.mark.parametrize("spread", [False, True], ids=["in order", "spread"])
@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_dense_attention(pool, name, t, spread):
    expected, expected_lse = dense(t, OPTIONS[name])
    for out, lse in pool.run(None, decode, t, name, spread, ranks=[2, 0, 1]):
        assert_close_float64(out, expected, "out")
        assert_close_float64(lse, expected_lse, "softmax_lse")


@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_one_device(name, t):
    out, lse = decode(None, t, name, False)
    expected, expected_lse = dense(t, OPTIONS[name])
    assert_close_float64(out, expected, "out")
    assert_close_float64(lse, expected_lse, "softmax_lse")


def test_pieces_of_a_long_cache(monkeypatch):
    monkeypatch.setattr("nnscaler_ring.core.decode.KEYS_AT_ONCE", 3)
    out, _ = decode(None, 3, "all", False)
    assert_close_float64(out, dense(3, OPTIONS["all"])[0], "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(pool, dtype):
    expected, _ = dense(3, OPTIONS["window"])
    for out, lse in pool.run(3, decode, 3, "window", True, dtype):
        assert lse.dtype == torch.float32
        assert_close_relative(out, expected, "out")


def grow(ranks: list[int]) -> tuple[int, int, int, int]:
    """Agreements and bytes of ten steps in which the cache grows."""
    set_agreement_timeout(dist.group.WORLD, 25.0)
    q, k, v = make_qkv(0, 2, 1, 40, HEADS, KV_HEADS, DIM, V_DIM)
    state = group_state(group_string(ranks))
    before, moved = state.agreements, traffic(ranks)
    for step in range(10):
        rows = slice(0, 5 + step)
        decode_attention(q, k[:, rows], v[:, rows], torch.tensor([5 + step, step]), ranks)
    sent = traffic(ranks) - moved
    return state.agreements - before, sent.partial_bytes, sent.total_bytes, sent.messages


def test_lengths_are_data(pool):
    for agreements, partial, total, messages in pool.run(3, grow):
        assert agreements <= 1
        assert messages == 10 * 2
        assert partial == total == 10 * 2 * 2 * HEADS * (V_DIM + 1) * 8


def disagree(ranks: list[int]) -> str:
    set_agreement_timeout(dist.group.WORLD, 25.0)
    q, k, v = make_qkv(0, 1, 1, 4, HEADS, KV_HEADS, DIM, V_DIM)
    cap = 2.0 if ranks.index(dist.get_rank()) else 0.0
    with pytest.raises(ValueError, match="softcap") as error:
        decode_attention(q, k, v, torch.tensor([4]), ranks, softcap=cap)
    return str(error.value)


def test_ranks_that_disagree(pool):
    assert all("0.0" in text and "2.0" in text for text in pool.run(2, disagree))


Q, K, V = make_qkv(0, 2, 1, 4, HEADS, KV_HEADS, DIM, V_DIM)
GOOD: dict[str, Any] = {"q": Q, "k_cache": K, "v_cache": V, "cache_lens": torch.tensor([4, 0])}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": Q[0]}, r"q must be \[batch, t, num_heads, head_dim\], got \[1, 6, 8\]"),
        ({"k_cache": K.float()}, "k_cache must be .* torch.float64, cpu, got .* torch.float32"),
        ({"v_cache": V[:, :3]}, "k_cache and v_cache must have the same rows and heads"),
        ({"q": Q[:, :, :5]}, "num_heads of q must be a multiple of num_kv_heads, got 5 and 2"),
        ({"cache_lens": torch.tensor([5, 0])}, "from 0 to the capacity, 4, got"),
        ({"cache_lens": torch.tensor([-1, 0])}, "from 0 to the capacity, 4, got"),
        ({"cache_lens": torch.tensor([1])}, r"cache_lens must have shape \[2\]"),
        ({"key_positions": torch.zeros(2, 3).long()}, r"key_positions must have shape \[2, 4\]"),
        ({"kernel": "fast"}, "kernel must be one of"),
        ({"window_size": (-2, 0)}, "window_size entries must be -1 or >= 0"),
        ({"q": Q.clone().requires_grad_()}, "must not require gradients"),
    ],
)
def test_wrong_arguments(wrong, message):
    decode_attention(**GOOD)
    with pytest.raises(ValueError, match=message):
        decode_attention(**{**GOOD, **wrong})


def test_lengths_must_be_a_tensor_of_integers():
    with pytest.raises(TypeError, match="cache_lens must be an int32 or int64 tensor"):
        decode_attention(**{**GOOD, "cache_lens": [4, 0]})


# merge_attention


@pytest.mark.parametrize("packed", [False, True])
def test_merging_parts_over_other_keys(packed):
    q, k, v = make_qkv(3, 2, 5, 9, HEADS, KV_HEADS, DIM, V_DIM)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    whole, whole_lse = dense_attention(q, k, v)
    parts = [dense_attention(q, k[:, a:b], v[:, a:b]) for a, b in ((0, 2), (2, 8), (8, 9))]
    outs, lses = [out for out, _ in parts], [lse for _, lse in parts]
    blind = torch.full_like(lses[0], -torch.inf)
    outs, lses = [*outs, torch.zeros_like(outs[0])], [*lses, blind]
    if packed:
        out, lse = merge_attention([x[1] for x in outs], [x[1] for x in lses])
        whole, whole_lse = whole[1], whole_lse[1]
    else:
        out, lse = merge_attention(outs, lses)
    assert_close_float64(out, whole, "out")
    assert_close_float64(lse, whole_lse, "softmax_lse")
    found = torch.autograd.grad((out.sin() * lse.cos().mT.unsqueeze(-1)).sum(), (q, k, v))
    wanted = torch.autograd.grad((whole.sin() * whole_lse.cos().mT.unsqueeze(-1)).sum(), (q, k, v))
    for name, x, y in zip("qkv", found, wanted, strict=True):
        assert_close_float64(x, y, f"d{name}")


def test_rows_that_no_part_shows_a_key():
    outs = [torch.zeros(1, 2, HEADS, DIM).requires_grad_() for _ in range(2)]
    lses = [torch.full((1, HEADS, 2), -torch.inf).requires_grad_() for _ in range(2)]
    out, lse = merge_attention(outs, lses)
    assert not out.any() and (lse == -torch.inf).all()
    for gradient in torch.autograd.grad(out.sum() + lse.exp().sum(), (*outs, *lses)):
        assert torch.isfinite(gradient).all()


def test_parts_that_do_not_belong_together():
    out, lse = torch.zeros(1, 2, HEADS, DIM), torch.zeros(1, HEADS, 2)
    with pytest.raises(ValueError, match="must be equally many, at least one, got 0 and 0"):
        merge_attention([], [])
    with pytest.raises(ValueError, match="must be equally many"):
        merge_attention([out], [lse, lse])
    with pytest.raises(ValueError, match="outs must all be"):
        merge_attention([out, out[:, :1]], [lse, lse])
    with pytest.raises(ValueError, match="outs must all be"):
        merge_attention([out], [lse.mT])
    assert merge_attention([out.bfloat16()], [lse])[0].dtype == torch.bfloat16
