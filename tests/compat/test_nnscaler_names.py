"""nnScaler's own ring ops by name: values and gradients on ranks against dense float64."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler_ring.compat import nnscaler as names
from tests.oracle import Mods, dense_attention, make_dout, make_qkv
from tests.ranks import RankPool
from tests.tolerances import assert_close_float64

DOCUMENTS = {2: [0, 4, 16, 16, 24], 3: [0, 6, 24, 24, 36]}  # one is empty; all divide by 2 N
SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.02, 0.3, 0.7], dtype=torch.float64)
PACKED: dict[str, dict[str, Any]] = {
    "ring": {"causal": True},
    "ring, every argument": {
        "alibi_slopes": SLOPES,
        "softmax_scale": 0.3,
        "window_size": (3, 2),
        "deterministic": False,
        "return_lse": True,
        "max_seqlen_q": 12,
        "max_seqlen_k": 12,
    },
    "sliding window": {"window_size": (3, 0)},
    "sliding window of several shards": {"window_size": (17, 0), "return_lse": True},
    "all-gather": {"causal": True, "return_lse": True},
    "all-gather, not causal": {"causal": False},
    "all-gather, window and slopes": {
        "causal": True,
        "window_size": (2, -1),
        "alibi_slopes": SLOPES,
        "return_lse": True,
    },
}


def whole(ranks: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    bounds = torch.tensor(DOCUMENTS[ranks], dtype=torch.int32)
    tokens = DOCUMENTS[ranks][-1]
    q, k, v = make_qkv(ranks, None, tokens, tokens, 6, 2, 4)
    return q, k, v, bounds, make_dout(1, q, v)


def attend(ranks: list[int], name: str) -> dict[str, Tensor]:
    """This rank's rows of the results and of dq, and its parts of dk and dv, as if whole."""
    q, k, v, bounds, dout = whole(len(ranks))
    rows = slice(*(len(q) // len(ranks) * (dist.get_rank() + n) for n in (0, 1)))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    options = {"process_group": ranks, **PACKED[name]}
    if name.startswith("all-gather"):
        mine = names.wrap_maybe_shuffle(q[rows], bounds, True, ranks)
        found = names.wrap_zigzag_allgather_attn_varlen_func(mine, k, v, bounds, bounds, **options)
    else:
        function = names.wrap_ring_attn_varlen_func
        if name.startswith("sliding"):
            function = names.wrap_sliding_window_attn_func
        slopes = options.pop("alibi_slopes", None)  # sixth, by position
        found = function(q[rows], k[rows], v[rows], bounds, bounds, slopes, **options)
    out, lse = found if isinstance(found, tuple) else (found, None)
    if name.startswith("all-gather"):
        out = names.wrap_maybe_unshuffle(out, bounds, process_group=ranks)
        if lse is not None:
            lse = names.wrap_maybe_unshuffle(lse.T.contiguous(), bounds, True, ranks).T
    gradients = torch.autograd.grad(out, leaves, dout[rows])
    results = dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    results["dq"] = results["dq"][rows]
    return results | {"out": out.detach()} | ({} if lse is None else {"lse": lse.detach()})


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", PACKED)
def test_packed_ops(pool: RankPool, name: str, ranks: int) -> None:
    q, k, v, bounds, dout = whole(ranks)
    options = PACKED[name]
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = dense_attention(
        q,
        k,
        v,
        causal=options.get("causal", name.startswith("sliding")),
        window_size=options.get("window_size", (-1, -1)),
        softmax_scale=options.get("softmax_scale"),
        cu_seqlens_q=bounds,
        mods=Mods(alibi_slopes=options.get("alibi_slopes")),
    )
    expected = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, dout), strict=True))
    results = pool.run(ranks, attend, name, timeout=60)
    for key in ("dk", "dv"):
        assert_close_float64(sum(x[key] for x in results), expected[key], f"{key} of {name}")
    whole_of = {"out": out, "dq": expected["dq"]}
    for key, x in whole_of.items():
        assert_close_float64(torch.cat([found[key] for found in results]), x, f"{key} of {name}")
    if options.get("return_lse"):
        found_lse = torch.cat([found["lse"] for found in results], dim=1)
        assert_close_float64(found_lse, lse, f"lse of {name}")


def round_trip(ranks: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    bounds = torch.tensor(DOCUMENTS[len(ranks)])
    each = DOCUMENTS[len(ranks)][-1] // len(ranks)
    x = torch.arange(each * 2.0).view(each, 2) + dist.get_rank() * each * 2
    x.requires_grad_()
    there = names.wrap_maybe_shuffle(x, bounds, process_group=ranks)
    back = names.wrap_maybe_unshuffle(there, bounds, process_group=ranks)
    (dx,) = torch.autograd.grad((there * there.detach()).sum(), x)
    alone = names.wrap_maybe_shuffle(x, bounds, enable_ring=False, process_group=ranks)
    assert torch.equal(back, x) and alone is x
    return there.detach(), dx, x.detach()


def test_shuffle(pool: RankPool) -> None:
    """Rank r holds chunks r and 2N-1-r of each document; gradients go back the same way."""
    for rank, (there, dx, x) in enumerate(pool.run(2, round_trip)):
        assert torch.equal(dx, x)
        chunks = []
        for start, stop in ((0, 4), (4, 16), (16, 24)):
            size = (stop - start) // 4
            chunks += [start + size * rank + n for n in range(size)]
            chunks += [start + size * (3 - rank) + n for n in range(size)]
        assert there[:, 0].tolist() == [2.0 * token for token in chunks]


def test_alone() -> None:
    """Without a group all of them are the packed op, also with the ring off."""
    q, k, v, bounds, _ = whole(2)
    expected, _ = dense_attention(q, k, v, causal=True, cu_seqlens_q=bounds)
    for function in (
        names.wrap_ring_attn_varlen_func,
        names.wrap_sliding_window_attn_func,
        names.wrap_zigzag_allgather_attn_varlen_func,
    ):
        out = function(q, k, v, bounds, bounds, None, 0.0, None, True, (-1, -1), False, False, True)
        assert_close_float64(out, expected, "out")
    assert names.wrap_maybe_unshuffle(q, bounds) is q


def refused(ranks: list[int], mistake: str) -> str:
    q, k, v, bounds, _ = whole(2)
    half = len(q) // 2
    given: dict[str, Any] = {"process_group": ranks, "causal": True}
    q = q[:half]
    if mistake == "documents":
        bounds = torch.tensor([0, 2, 24], dtype=torch.int32)
    elif mistake == "dropout":
        given["dropout_p"] = 0.1
    else:
        given |= {"causal": False, "window_size": (2, 2)}
    try:
        names.wrap_zigzag_allgather_attn_varlen_func(q, k, v, bounds, bounds, None, **given)
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("documents", "cu_seqlens_q must give documents that divide by 4, twice the ranks"),
        ("dropout", "dropout_p must be 0 with queries in zigzag order"),
        ("window", r"window_size must be (-1, -1) and alibi_slopes None without causal"),
    ],
)
def test_refused_on_all_ranks(pool: RankPool, mistake: str, message: str) -> None:
    assert all(message in error for error in pool.run(2, refused, mistake, timeout=30))


def test_arguments_are_honoured_or_refused() -> None:
    q, k, v, bounds, _ = whole(2)
    function = names.wrap_ring_attn_varlen_func
    with pytest.raises(ValueError, match="max_seqlen_k must be None or an int >= 0, got 2.5"):
        function(q, k, v, bounds, bounds, max_seqlen_k=2.5)
    with pytest.raises((ValueError, ImportError), match="flash_attn_4"):
        function(q, k, v, bounds, bounds, use_cute=True)
    with pytest.raises((ValueError, NotImplementedError), match="return_attn_probs"):
        function(q, k, v, bounds, bounds, return_attn_probs=True)
