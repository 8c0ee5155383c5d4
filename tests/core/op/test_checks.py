"""Every wrong argument is refused by name: alone, and in a group where all ranks make the mistake.

What happens when one rank alone is wrong is in test_agreement.py; wrong groups are in
test_groups.py.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from nnscaler_ring import (
    DropoutSeed,
    wrap_ring_attn_func,
    wrap_ring_attn_varlen_func,
    wrap_zigzag_attn_func,
    zigzag_positions,
    zigzag_shard,
    zigzag_unshard,
)
from nnscaler_ring.core.exchange import EXCHANGES
from nnscaler_ring.masks import Chunks, Prefix, Rectangles
from tests.core.attempts import TOKENS, Attempt, arguments, attempt, line_up

RING, ZIGZAG, VARLEN = wrap_ring_attn_func, wrap_zigzag_attn_func, wrap_ring_attn_varlen_func
ALL = (RING, ZIGZAG, VARLEN)
DENSE = (RING, ZIGZAG)

Change = Callable[[dict[str, Any]], dict[str, Any]]


class Wrong(NamedTuple):
    """A change of good arguments, and how the call must end."""

    ops: tuple[Callable[..., Any], ...]
    change: Change
    error: type[Exception]
    message: str


def given(**new: Any) -> Change:
    """These arguments instead."""
    return lambda good: new


def changed(**new: Callable[[Any], Any]) -> Change:
    """These functions of the good arguments instead."""
    return lambda good: {name: change(good[name]) for name, change in new.items()}


def narrowed(dim: int, *names: str) -> Change:
    """Tensors with one entry less along a dimension."""
    return changed(**{name: lambda x: x.narrow(dim, 0, x.shape[dim] - 1) for name in names})


TENSORS = {
    "q is an array": Wrong(
        ALL, changed(q=lambda x: x.numpy()), TypeError, r"q must be a tensor \[.*\], got ndarray"
    ),
    "v is None": Wrong(ALL, given(v=None), TypeError, "v must be a tensor .*, got NoneType"),
    "dense q without batch": Wrong(
        DENSE,
        changed(q=lambda x: x[0]),
        ValueError,
        r"q must be \[batch, tokens, num_heads, head_dim\], got shape \[4, 4, 8\]; "
        "for packed: wrap_ring_attn_varlen_func",
    ),
    "packed k with batch": Wrong(
        (VARLEN,),
        changed(k=lambda x: x[None]),
        ValueError,
        r"k must be \[tokens, num_heads, head_dim\], got shape \[1, 4, 2, 8\]; "
        "for a batch: wrap_ring_attn_func",
    ),
    "integer q": Wrong(
        ALL,
        changed(q=lambda x: x.int()),
        ValueError,
        "q must be float64, float32, bfloat16 or float16, got torch.int32; convert it",
    ),
    "float8 q": Wrong(
        ALL,
        changed(q=lambda x: x.to(torch.float8_e4m3fn)),
        ValueError,
        "q must be float64, float32, bfloat16 or float16, got torch.float8_e4m3fn",
    ),
    "k of another dtype": Wrong(
        ALL,
        changed(k=lambda x: x.float()),
        ValueError,
        "k must have q's dtype, torch.float64, got torch.float32; convert it",
    ),
    "v on another device": Wrong(
        ALL,
        changed(v=lambda x: x.to("meta")),
        ValueError,
        "v must be on q's device, cpu, got meta; move it",
    ),
    "no KV heads": Wrong(
        ALL,
        changed(k=lambda x: x[..., :0, :], v=lambda x: x[..., :0, :]),
        ValueError,
        r"k must have at least 1 head of 1 channel, got \[.*0, 8\]",
    ),
    "v without channels": Wrong(
        ALL,
        changed(v=lambda x: x[..., :0]),
        ValueError,
        "v must have at least 1 head of 1 channel",
    ),
    "v of another batch": Wrong(
        DENSE,
        changed(v=lambda x: x[:1]),
        ValueError,
        r"v must have k's batch, tokens and heads, \[2, 4, 2\], got \[1, 4, 2\]",
    ),
    "v of other tokens": Wrong(
        ALL, narrowed(-3, "v"), ValueError, r"v must have k's batch, tokens and heads, \[.*4, 2\]"
    ),
    "v of other heads": Wrong(
        ALL, narrowed(-2, "v"), ValueError, r"v must have k's batch, tokens and heads, \[.*4, 2\]"
    ),
    "k of another head_dim": Wrong(
        ALL,
        narrowed(-1, "k"),
        ValueError,
        "k must have q's head_dim, 8, got 7; only v may differ",
    ),
    "3 heads over 2 KV heads": Wrong(
        ALL,
        narrowed(-2, "q"),
        ValueError,
        "num_heads of q must be a multiple of num_kv_heads, got 3 and 2; repeat the KV heads",
    ),
    "k and v of other tokens than q": Wrong(
        DENSE,
        narrowed(1, "k", "v"),
        ValueError,
        r"k must have q's batch and tokens, \[2, 4\], got \[2, 3\]; .*wrap_ring_attn_varlen_func",
    ),
    "k and v of another batch than q": Wrong(
        DENSE, narrowed(0, "k", "v"), ValueError, r"k must have q's batch and tokens, \[2, 4\]"
    ),
}

CU_SEQLENS = {
    "a list": Wrong(
        (VARLEN,),
        given(cu_seqlens_q=[0, 4]),
        TypeError,
        r"cu_seqlens_q must be an int32 or int64 tensor \[documents \+ 1\], got list",
    ),
    "None": Wrong(
        (VARLEN,), given(cu_seqlens_k=None), TypeError, "cu_seqlens_k must be .*, got NoneType"
    ),
    "floats": Wrong(
        (VARLEN,),
        changed(cu_seqlens_k=lambda x: x.float()),
        ValueError,
        "cu_seqlens_k must be int32 or int64, got torch.float32; convert it",
    ),
    "two dimensions": Wrong(
        (VARLEN,),
        changed(cu_seqlens_q=lambda x: x[None]),
        ValueError,
        r"cu_seqlens_q must be \[documents \+ 1\] for at least one document, got shape \[1, 4\]",
    ),
    "no document": Wrong(
        (VARLEN,),
        changed(cu_seqlens_q=lambda x: x[:1]),
        ValueError,
        r"cu_seqlens_q must be \[documents \+ 1\] .*, got shape \[1\]",
    ),
    "different numbers of documents": Wrong(
        (VARLEN,),
        changed(cu_seqlens_k=lambda x: x[1:]),
        ValueError,
        "cu_seqlens_k must have as many documents as cu_seqlens_q, 3, got 2; a document without",
    ),
    "starts at 1": Wrong(
        (VARLEN,),
        changed(cu_seqlens_q=lambda x: x.clamp(min=1)),
        ValueError,
        "cu_seqlens_q must start at 0, got 1; it is 0 and then the end of every document",
    ),
    "falls": Wrong(
        (VARLEN,),
        changed(cu_seqlens_k=lambda x: x[torch.tensor([0, 3, 1, 3])]),
        ValueError,
        "cu_seqlens_k must never fall, got [48] before 1 at index 1; a document without tokens",
    ),
    "ends too early": Wrong(
        (VARLEN,),
        changed(cu_seqlens_q=lambda x: x.clamp(max=3)),
        ValueError,
        "cu_seqlens_q must end at the tokens of all shards together, [48], got 3; it is global",
    ),
    "ends too late": Wrong(
        (VARLEN,),
        changed(cu_seqlens_k=lambda x: x * 2),
        ValueError,
        "cu_seqlens_k must end at the tokens of all shards together, (4, got 8|8, got 16); ",
    ),
}

MASKS = {
    "causal is an int": Wrong(
        ALL, given(causal=1), TypeError, "causal must be True or False, got 1"
    ),
    "window_size is None": Wrong(
        ALL,
        given(window_size=None),
        TypeError,
        r"window_size must be two ints \(left, right\), got None",
    ),
    "window_size is an int": Wrong(
        ALL, given(window_size=3), TypeError, "window_size must be two ints .*, got 3"
    ),
    "window_size is a tensor": Wrong(
        ALL,
        given(window_size=torch.tensor([1, 2])),
        TypeError,
        "window_size must be two ints .*, got tensor",
    ),
    "window_size of floats": Wrong(
        ALL, given(window_size=(3.0, 0)), TypeError, r"window_size must be two ints .*\(3.0, 0\)"
    ),
    "window_size of one side": Wrong(
        ALL, given(window_size=(3,)), ValueError, r"window_size must be two ints .*, got \(3,\)"
    ),
    "window_size of three sides": Wrong(
        ALL, given(window_size=(3, 0, 0)), ValueError, "window_size must be two ints .*, got "
    ),
    "negative window": Wrong(
        ALL,
        given(window_size=(-2, 0)),
        ValueError,
        r"window_size entries must be -1 or >= 0, got \(-2, 0\); use -1 for unbounded",
    ),
    "a mask that is none": Wrong(
        ALL, given(mask=3), TypeError, "mask must be a mask such as .*, its text, or None, got int"
    ),
    "text that is no mask": Wrong(
        ALL, given(mask="causal"), ValueError, r"mask must be made of .* got 'causal' in 'causal'"
    ),
    "a mask and a window": Wrong(
        DENSE,
        given(mask=Chunks(2), window_size=(3, 0)),
        ValueError,
        r"mask must be None where causal or window_size is given, got mask=Chunks\(size=2\), "
        r"causal=True, window_size=\(3, 0\); .* leave both out",
    ),
    "a mask and causal": Wrong(
        DENSE,
        given(mask=Chunks(2), causal=False),
        ValueError,
        "mask must be None where causal or window_size is given, .*causal=False",
    ),
    "a packed mask and causal": Wrong(
        (VARLEN,),
        given(mask=Chunks(2), causal=True),
        ValueError,
        "mask must be None where causal or window_size is given, .*causal=True",
    ),
    "a mask of more positions": Wrong(
        DENSE,
        given(mask=Rectangles([(0, 99, 0, 2)])),
        ValueError,
        r"rectangles\[0\] must lie within the \d+ positions of the sequence, .* got \(0, 99, 0, 2",
    ),
    "prefixes of other documents": Wrong(
        (VARLEN,),
        given(mask=Prefix([1] * 9)),
        ValueError,
        "length of Prefix must have one length for each of the . documents, got 9",
    ),
}

OPTIONS = {
    "softmax_scale is text": Wrong(
        ALL, given(softmax_scale="1"), TypeError, "softmax_scale must be a float or None, got '1'"
    ),
    "softmax_scale is a tensor": Wrong(
        ALL,
        given(softmax_scale=torch.tensor(1.0)),
        TypeError,
        "softmax_scale must be a float or None, got tensor",
    ),
    "softmax_scale is a bool": Wrong(
        ALL, given(softmax_scale=True), TypeError, "softmax_scale must be a float or None, got True"
    ),
    "infinite softmax_scale": Wrong(
        ALL,
        given(softmax_scale=float("inf")),
        ValueError,
        r"softmax_scale must be finite, got inf; None: 1/sqrt\(d\)",
    ),
    "softmax_scale is nan": Wrong(
        ALL, given(softmax_scale=float("nan")), ValueError, "softmax_scale must be finite, got nan"
    ),
    "unknown exchange": Wrong(
        ALL,
        given(exchange="bcast"),
        ValueError,
        re.escape(f"exchange must be one of {(*EXCHANGES,)}, got 'bcast'"),
    ),
    "exchange is a list": Wrong(
        ALL, given(exchange=["ring"]), ValueError, r"exchange must be one of .*, got \['ring'\]"
    ),
    "unknown kernel": Wrong(
        ALL,
        given(kernel="fast"),
        ValueError,
        r"kernel must be 'auto' or one of \(.*'reference'.*\), got 'fast'",
    ),
    "kernel is None": Wrong(
        ALL, given(kernel=None), ValueError, "kernel must be 'auto' or one of .*, got None"
    ),
    "deterministic is an int": Wrong(
        ALL, given(deterministic=1), TypeError, "deterministic must be True or False, got 1"
    ),
    "return_lse is None": Wrong(
        ALL, given(return_lse=None), TypeError, "return_lse must be True or False, got None"
    ),
    "return_attn_probs": Wrong(
        ALL,
        given(return_attn_probs=True),
        NotImplementedError,
        "return_attn_probs must be False: .* whole score matrix, .*; use return_lse=True",
    ),
    "unknown layout": Wrong(
        (ZIGZAG,),
        given(layout="striped"),
        ValueError,
        "layout must be 'contiguous' or 'zigzag', got 'striped'",
    ),
    "layout is a list": Wrong(
        (ZIGZAG,),
        given(layout=["zigzag"]),
        ValueError,
        r"layout must be 'contiguous' or 'zigzag', got \['zigzag'\]",
    ),
    "layout that packed rows do not have": Wrong(
        (VARLEN,),
        given(layout="zigzag"),
        ValueError,
        "layout must be 'contiguous' or 'folded' or 'contiguous, folded', got 'zigzag'",
    ),
    "layout where there is none": Wrong(
        (RING,),
        given(layout="zigzag"),
        TypeError,
        "attn.*_func.. got an unexpected keyword argument 'layout'",
    ),
    "shard_lens_k where there is none": Wrong(
        DENSE,
        given(shard_lens_k=[4]),
        TypeError,
        "got an unexpected keyword argument 'shard_lens_k'",
    ),
    "unknown keyword": Wrong(
        ALL, given(windowsize=3), TypeError, "got an unexpected keyword argument 'windowsize'"
    ),
}


def options(**cases: tuple[Any, type[Exception], str]) -> dict[str, Wrong]:
    """Values of one argument, for every op: name_what=(value, error, message)."""
    table = {}
    for key, (value, error, message) in cases.items():
        name, what = key.split("__")
        table[f"{name} {what}"] = Wrong(ALL, given(**{name: value}), error, message)
    return table


SCORES = {
    **options(
        softcap__none=(None, TypeError, "softcap must be a float, got None"),
        softcap__negative=(-1.0, ValueError, "softcap must be finite and >= 0, got -1.0"),
        softcap__infinite=(float("inf"), ValueError, "softcap must be finite and >= 0, got inf"),
        dropout_p__tensor=(torch.zeros(2), TypeError, "dropout_p must be a float, got tensor"),
        dropout_p__one=(1.0, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        dropout_p__negative=(-0.1, ValueError, r"dropout_p must be in \[0, 1\), got -0.1"),
        dropout_p__nan=(float("nan"), ValueError, r"dropout_p must be in \[0, 1\), got nan"),
        dropout_seed__alone=(3, ValueError, "dropout_seed must be None where dropout_p is 0.0"),
        dropout_seed__text=("3", TypeError, "dropout_seed must be an int or None, got '3'"),
        dropout_seed__wide=(1 << 63, ValueError, "dropout_seed must fit into 64 bits"),
        dropout_seed__batch=(
            DropoutSeed(None, first_batch=-1),
            ValueError,
            "dropout_seed.first_batch must be >= 0, got -1",
        ),
        dropout_seed__head=(
            DropoutSeed(None, first_head=0.5),
            TypeError,
            "dropout_seed.first_head must be an int, got 0.5",
        ),
        alibi_slopes__list=([1.0], TypeError, "alibi_slopes must be a tensor or None, got list"),
        alibi_slopes__ints=(
            torch.ones(4, dtype=torch.int64),
            ValueError,
            "alibi_slopes must be of a floating dtype, got torch.int64",
        ),
        alibi_slopes__heads=(
            torch.ones(2),
            ValueError,
            r"alibi_slopes must be \[4\].* one slope per query head.* got \[2\]",
        ),
        alibi_slopes__grad=(
            torch.ones(4, requires_grad=True),
            ValueError,
            "alibi_slopes must not require a gradient, .*detach.*bias",
        ),
        alibi_slopes__device=(
            torch.ones(4, device="meta"),
            ValueError,
            "alibi_slopes must be on q's device, cpu, got meta",
        ),
        sinks__heads=(torch.ones(2), ValueError, r"sinks must be \[num_heads\].* got \[2\]"),
        sinks__rows=(torch.ones(4, 1), ValueError, r"sinks must be \[num_heads\].* got \[4, 1\]"),
        sinks__bools=(torch.ones(4) > 0, ValueError, "sinks must be of a floating dtype"),
        bias__scalar=(torch.ones(()), ValueError, r"bias must be \[.*all keys\], got shape \[\]"),
        bias__array=([[0.0]], TypeError, "bias must be a tensor or None, got list"),
    ),
    "bias of other rows": Wrong(
        DENSE,
        given(bias=torch.zeros(2, 4, TOKENS + 1, TOKENS)),
        ValueError,
        r"bias must be .* for q \[2, 4, 4, 8\], got \[2, 4, 5, 4\]; its rows follow the layout",
    ),
    "bias of other heads": Wrong(
        (VARLEN,),
        given(bias=torch.zeros(2, TOKENS, TOKENS)),
        ValueError,
        r"bias must be .* for q \[4, 4, 8\], got \[2, 4, 4\]",
    ),
    "bias of other keys": Wrong(
        DENSE,
        given(bias=torch.zeros(1, 1, TOKENS, 3)),
        ValueError,
        "bias must have a column for each of the [48] keys of all ranks, got 3 columns",
    ),
    "slopes of a batch, packed": Wrong(
        (VARLEN,),
        given(alibi_slopes=torch.zeros(2, 4)),
        ValueError,
        r"alibi_slopes must be \[4\], one slope per query head, got \[2, 4\]",
    ),
}

SHARD_LENS = {
    "too many": Wrong(
        ALL,
        given(shard_lens=[4, 4, 4]),
        ValueError,
        r"shard_lens must have one length for each of the [12] ranks of process_group, got 3: "
        r"\[4, 4, 4\]",
    ),
    "none": Wrong(ALL, given(shard_lens=[]), ValueError, r"shard_lens must have .*, got 0: \[\]"),
    "a tensor": Wrong(
        ALL,
        given(shard_lens=torch.tensor([4])),
        TypeError,
        "shard_lens must be a sequence of ints, got Tensor; use a list",
    ),
    "text": Wrong(
        ALL, given(shard_lens="4"), TypeError, "shard_lens must be a sequence of ints, got str"
    ),
    "floats": Wrong(
        ALL, given(shard_lens=[4.0, 4.0]), TypeError, r"shard_lens must hold ints, got \[4.0"
    ),
    "bools": Wrong(ALL, given(shard_lens=[True]), TypeError, "shard_lens must hold ints, got"),
    "too many of k": Wrong(
        (VARLEN,),
        given(shard_lens_k=[4, 4, 4]),
        ValueError,
        r"shard_lens_k must have one length for each of the [12] ranks .*, got 3",
    ),
}

SHARD_LENS_ALONE = {
    "negative": Wrong(
        ALL,
        given(shard_lens=[-4]),
        ValueError,
        r"shard_lens must not be negative, got \[-4\]; 0 is an empty shard",
    ),
    "not the tokens": Wrong(
        ALL,
        given(shard_lens=[3]),
        ValueError,
        r"shard_lens\[0\] must be the number of tokens that this rank passes, 4, got 3 in \[3\]",
    ),
    "not the tokens of k": Wrong(
        (VARLEN,),
        given(shard_lens_k=[3]),
        ValueError,
        r"shard_lens_k\[0\] must be the number of tokens that this rank passes, 4, got 3",
    ),
}

SHARD_LENS_OF_TWO = {
    "negative": Wrong(
        ALL, given(shard_lens=[4, -4]), ValueError, r"shard_lens must not be negative, got \[4, -4"
    ),
    "not the tokens": Wrong(
        ALL,
        given(shard_lens=[3, 5]),
        ValueError,
        r"shard_lens\[[01]\] must be the number of tokens that this rank passes, 4, got [35] in "
        r"\[3, 5\]",
    ),
    "not the tokens of k": Wrong(
        (VARLEN,),
        given(shard_lens_k=[5, 3]),
        ValueError,
        r"shard_lens_k\[[01]\] must be the number of tokens that this rank passes, 4, got [35]",
    ),
    "not what zigzag gives": Wrong(
        (ZIGZAG,),
        lambda good: {
            "layout": "zigzag",
            "shard_lens": [4, 0],
            **{name: x[:, : 4 * (torch.distributed.get_rank() == 0)] for name, x in good.items()},
        },
        ValueError,
        r"shard_lens must be what layout='zigzag' gives 4 tokens over 2 ranks, \[2, 2\], got "
        r"\[4, 0\]",
    ),
}

TABLES = {
    "tensors": TENSORS,
    "cu_seqlens": CU_SEQLENS,
    "masks": MASKS,
    "options": OPTIONS,
    "scores": SCORES,
    "shard_lens": SHARD_LENS,
}


def attempts(table: dict[str, Wrong], world_size: int, group: Any) -> dict[str, Attempt]:
    """How the calls of a table end; a good call before and after each must return."""
    found = {}
    for name, wrong in table.items():
        for op in wrong.ops:
            good = arguments(op, world_size)
            bad = {**good, **wrong.change(good)}
            found[f"{op.__name__}, {name}"] = attempt(lambda: op(**bad, process_group=group), group)  # noqa: B023
    for op in ALL:
        good = attempt(lambda: op(**arguments(op, world_size), process_group=group), group)  # noqa: B023
        assert good.error == "", (op, good)
    return found


def check_table(found: dict[str, Attempt], table: dict[str, Wrong]) -> None:
    """Every call of the table ended as it says, quickly, and nothing was sent."""
    for name, wrong in table.items():
        for op in wrong.ops:
            end = found[f"{op.__name__}, {name}"]
            assert end.error == wrong.error.__name__, (op.__name__, name, end)
            assert re.search(wrong.message, end.message), (op.__name__, name, end.message)
            assert end.sent == 0, (op.__name__, name, end)
            assert end.seconds < 2.0, (op.__name__, name, end)


@pytest.mark.parametrize("table", [*TABLES.values(), SHARD_LENS_ALONE], ids=[*TABLES, "alone"])
def test_one_device_refuses_by_name(table):
    check_table(attempts(table, 1, None), table)


def attempts_of_all(ranks):
    line_up(ranks)
    tables = [*TABLES.values(), SHARD_LENS_OF_TWO]
    return [attempts(table, len(ranks), ranks) for table in tables]


def test_ranks_that_are_all_wrong_raise_their_own_errors(pool):
    for found in pool.run(2, attempts_of_all):
        for attempts_of_table, table in zip(
            found, [*TABLES.values(), SHARD_LENS_OF_TWO], strict=True
        ):
            check_table(attempts_of_table, table)


def test_windows_wider_than_an_int64_are_unbounded():
    good = arguments(RING)
    assert torch.equal(RING(**good, window_size=(1 << 70, 0)), RING(**good))


# Zigzag's functions beside attention.

X = torch.zeros(2, TOKENS, 3)

RELAYOUT = {
    "x is a list": (lambda f, g: f([1], g), TypeError, "x must be a tensor, got list"),
    "dim is text": (lambda f, g: f(X, g, dim="1"), TypeError, "dim must be an int, got '1'"),
    "dim is a bool": (lambda f, g: f(X, g, dim=True), TypeError, "dim must be an int, got True"),
    "dim is outside": (
        lambda f, g: f(X, g, dim=3),
        ValueError,
        r"dim must be a dimension of x, shape \[2, 4, 3\], got 3",
    ),
    "x is a scalar": (
        lambda f, g: f(X.sum(), g),
        ValueError,
        r"dim must be a dimension of x, shape \[\], got 1",
    ),
    "too many shard_lens": (
        lambda f, g: f(X, g, shard_lens=[4, 4, 4]),
        ValueError,
        "shard_lens must have one length for each of the [12] ranks of process_group, got 3",
    ),
    "shard_lens is text": (
        lambda f, g: f(X, g, shard_lens="44"),
        TypeError,
        "shard_lens must be a sequence of ints, got str",
    ),
    "unknown keyword": (
        lambda f, g: f(X, g, axis=1),
        TypeError,
        "unexpected keyword argument 'axis'",
    ),
}

RELAYOUT_OF_TWO = {
    "negative shard_lens": (
        lambda f, g: f(X, g, shard_lens=[4, -4]),
        ValueError,
        "shard_lens must not be negative",
    ),
    "shard_lens are not the tokens": (
        lambda f, g: f(X, g, shard_lens=[6, 6]),
        ValueError,
        r"x must have 6 rows along dim 1, what the (contiguous|zigzag) layout gives this rank for "
        r"shard_lens=\[6, 6\], got 4; shards of different lengths need shard_lens",
    ),
}


def check_relayouts(found, table):
    for (name, (_, error, message)), end in zip(table.items(), found, strict=True):
        assert end.error == error.__name__, (name, end)
        assert re.search(message, end.message), (name, end.message)
        assert end.sent == 0 and end.seconds < 2.0, (name, end)


@pytest.mark.parametrize("function", [zigzag_shard, zigzag_unshard])
def test_zigzag_order_refuses_by_name(function):
    ends = [attempt(lambda c=call: c(function, None)) for call, _, _ in RELAYOUT.values()]
    check_relayouts(ends, RELAYOUT)


def relayout_attempts(ranks):
    line_up(ranks)
    table = {**RELAYOUT, **RELAYOUT_OF_TWO}
    calls = [(f, call) for f in (zigzag_shard, zigzag_unshard) for call, _, _ in table.values()]
    return [attempt(lambda f=f, c=call: c(f, ranks), ranks) for f, call in calls]


def test_zigzag_order_refuses_by_name_in_a_group(pool):
    table = {**RELAYOUT, **RELAYOUT_OF_TWO}
    for ends in pool.run(2, relayout_attempts):
        check_relayouts(ends[: len(table)], table)
        check_relayouts(ends[len(table) :], table)


def test_positions_of_a_negative_length_are_refused():
    with pytest.raises(ValueError, match="total_tokens must be >= 0, got -1"):
        zigzag_positions(-1)


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_cu_seqlens_without_values_are_refused(name):
    good = arguments(VARLEN)
    with pytest.raises(ValueError, match=f"{name} must hold values"):
        VARLEN(**good | {name: good[name].to("meta")})


@pytest.mark.parametrize("function", [zigzag_shard, zigzag_unshard])
def test_zigzag_order_on_one_device_checks_shard_lens(function):
    with pytest.raises(ValueError, match="must have 5 rows|number of tokens that this rank passes"):
        function(X, shard_lens=[5])


@pytest.mark.parametrize("total", ["5", 5.0, None, True])
def test_positions_of_something_else_are_refused(total):
    with pytest.raises(TypeError, match="total_tokens must be an int"):
        zigzag_positions(total)
