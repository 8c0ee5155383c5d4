"""The registered ops: opcheck, fakes, autograd, compile; empty shards and dtypes on real ranks."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nnscaler_ring import wrap_ring_attn_func, wrap_ring_attn_varlen_func, wrap_zigzag_attn_func
from nnscaler_ring.core.op.options import Extras, Options, arguments_of, split_arguments
from nnscaler_ring.core.plan.layout import LAYOUTS
from nnscaler_ring.core.plan.masks import CAUSAL
from nnscaler_ring.core.ranks.groups import group_string
from tests.core.attempts import all_calls_have_one_number
from tests.core.kernels.test_reference import one_thread  # noqa: F401
from tests.oracle import make_dout, make_qkv

OPS = torch.ops.nnscaler_ring
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def options_of(group: str = "", **fields: Any) -> tuple:
    """The non-tensor arguments of an attention op."""
    usual = {
        "op": "test",
        "group": group,
        "shard_lens": None,
        "shard_lens_k": None,
        "caller_layout": "contiguous",
        "compute_layout": "contiguous",
        "compute_len": 8,
        "softmax_scale": 0.5,
        "mask": CAUSAL.text,
        "softcap": 0.0,
        "bias_gradient": False,
        "dropout_p": 0.0,
        "same_seed": False,
        "first_batch": 0,
        "first_head": 0,
        "exchange": "direct",
        "kernel": "torch_cpu",
        "deterministic": False,
        "wants_gradient": True,
    }
    return arguments_of(Options(**{**usual, **fields}))


def test_options_come_out_of_an_op_as_they_went_in():
    names = ("op", "caller_layout", "compute_layout", "mask", "exchange", "kernel")
    counts = ("compute_len", "first_batch", "first_head")
    flags = ("bias_gradient", "same_seed", "deterministic", "wants_gradient")
    for true in (None, *flags):
        options = Options(
            group="any name,\neven of two lines",
            shard_lens=[1, 2],
            shard_lens_k=None,
            softmax_scale=0.1,
            softcap=0.2,
            dropout_p=0.3,
            **{name: f"the {name}" for name in names},
            **{name: number for number, name in enumerate(counts)},
            **{name: name == true for name in flags},
        )
        assert split_arguments((*Extras(), *arguments_of(options))) == (Extras(), options)


def qkv_of(packed: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """8 tokens of 4 heads on 2 KV heads, with values wider than keys."""
    return make_qkv(1, None if packed else 2, 8, 8, 4, 2, 4, 6, dtype)


def attention_arguments(
    packed: bool, group: str, ranks: int, *, options: bool = False, layout: str = "contiguous"
) -> tuple:
    """Arguments of the forward op; `options`: with every optional tensor and number."""
    q, k, v = qkv_of(packed)
    cu = torch.tensor([0, 3, 8 * ranks], dtype=torch.int32) if packed else None
    extras, fields = Extras(cu, cu), {"compute_layout": layout}
    if options:
        heads = (4,) if packed else (1, 4)
        extras = Extras(
            cu,
            cu,
            alibi_slopes=torch.rand(4),
            bias=torch.randn(*heads, 8, 8 * ranks, dtype=torch.float64).requires_grad_(),
            sinks=torch.randn(4, dtype=torch.float64).requires_grad_(),
            dropout_seed=torch.tensor(5),
        )
        fields |= {"softcap": 4.0, "bias_gradient": True, "dropout_p": 0.3, "same_seed": True}
    inputs = (x.requires_grad_() for x in (q, k, v))
    return (*inputs, *extras, *options_of(group, **fields))


def backward_arguments(arguments: tuple) -> tuple:
    q, k, v, *others = arguments
    with torch.no_grad():
        out, lse, _, number, *moved = OPS.attention(*arguments)
    dout, dlse = make_dout(1, q, v), torch.ones_like(lse)
    count = len(Extras._fields)
    extras = Extras(*others[:count])
    if moved[0].numel():
        q, k, v, out, lse, bias = moved
        if extras.bias is not None:
            extras = extras._replace(bias=bias)
    tensors = (dout, dlse, q, k, v, out, lse, number, *extras)
    return (*(x if x is None else x.detach() for x in tensors), *others[count:])


def check_ops(ranks: list[int] | None) -> dict[str, dict[str, str]]:
    """opcheck of every op, dense and packed, moving rows or not, plain or not: test -> result."""
    group = "" if ranks is None else group_string(ranks)
    size = 1 if ranks is None else len(ranks)
    found = {}
    for packed, layout in ((False, "contiguous"), (True, "contiguous"), (False, "zigzag")):
        if ranks is None and layout == "zigzag":
            continue
        for options in (False, True):
            arguments = attention_arguments(packed, group, size, options=options, layout=layout)
            name = f"{'packed' if packed else 'dense'} {layout} {'options' if options else 'plain'}"
            found[f"attention {name}"] = torch.library.opcheck(OPS.attention.default, arguments)
            found[f"backward {name}"] = torch.library.opcheck(
                OPS.attention_backward.default, backward_arguments(arguments)
            )
    if ranks is not None:
        x = torch.randn(8, 3, requires_grad=True)
        way = (0, "test", group, None, "contiguous", "zigzag", 8)
        found["relayout"] = torch.library.opcheck(OPS.relayout.default, (x, None, *way))
    return found


def check_ops_of_a_group(ranks: list[int]) -> dict[str, dict[str, str]]:
    with all_calls_have_one_number():
        return check_ops(ranks)


def assert_all_passed(found: dict[str, dict[str, str]]) -> None:
    for name, results in found.items():
        assert set(results.values()) == {"SUCCESS"}, (name, results)


def test_opcheck_on_one_device():
    assert_all_passed(check_ops(None))


def test_opcheck_on_two_ranks(pool):
    for found in pool.run(2, check_ops_of_a_group, timeout=200):
        assert len(found) == 13
        assert_all_passed(found)


# Fakes.


def description(x: Tensor) -> tuple:
    return x.shape, x.dtype, x.stride(), x.device


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
def test_fakes_describe_the_results_without_a_group(packed, dtype):
    """Same shapes, dtypes and strides as the real op, from strided inputs too."""
    q, k, v = qkv_of(packed, dtype)
    cu = torch.tensor([0, 3, 8], dtype=torch.int32) if packed else None
    for heads_first in (False, True):
        if heads_first:
            q, k, v = (x.transpose(-3, -2).contiguous().transpose(-3, -2) for x in (q, k, v))
        arguments = (*Extras(cu, cu), *options_of())
        real = OPS.attention(q, k, v, *arguments)
        dout = make_dout(1, q, v)
        saved = (q, k, v, *real[:2], real[3])
        real_grads = OPS.attention_backward(dout, None, *saved, *arguments)
        with FakeTensorMode() as mode:
            fq, fk, fv, fdout = (mode.from_tensor(x) for x in (q, k, v, dout))
            fcu = None if cu is None else mode.from_tensor(cu)
            elsewhere = options_of("a group that this process does not have")
            arguments = (*Extras(fcu, fcu), *elsewhere)
            fake = OPS.attention(fq, fk, fv, *arguments)
            fake_grads = OPS.attention_backward(
                fdout, None, fq, fk, fv, *fake[:2], fake[3], *arguments
            )
        for one, other in zip((*fake, *fake_grads), (*real, *real_grads), strict=True):
            assert description(one) == description(other)


def test_fakes_of_moved_rows_are_as_many_as_are_computed():
    with FakeTensorMode():
        q, k = torch.empty(2, 8, 4, 4), torch.empty(2, 8, 2, 4)
        v = torch.empty(2, 8, 2, 6, dtype=torch.float32)
        options = options_of("elsewhere", compute_layout="zigzag", compute_len=5)
        extras = Extras(bias=torch.empty(1, 4, 8, 14))
        shapes = [tuple(x.shape) for x in OPS.attention(q, k, v, *extras, *options)]
    out, lse, seed, number = (2, 8, 4, 6), (2, 4, 8), (0,), (1,)
    q_, k_, v_, out_, lse_ = (2, 5, 4, 4), (2, 5, 2, 4), (2, 5, 2, 6), (2, 5, 4, 6), (2, 4, 5)
    assert shapes == [out, lse, seed, number, q_, k_, v_, out_, lse_, (1, 4, 5, 14)]


def test_fake_of_a_relayout_has_the_new_rows():
    with FakeTensorMode():
        x = torch.empty(3, 8, 2, dtype=torch.int64).transpose(0, 2)
        moved, number = OPS.relayout(
            x, None, 1, "test", "elsewhere", [8, 6], "contiguous", "zigzag", 7
        )
        assert description(moved) == description(
            torch.empty(2, 7, 3, dtype=torch.int64, device="cpu")
        )
        assert description(number) == description(torch.empty(1, dtype=torch.int64))


# Autograd.


def public_call(name: str, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    if name == "varlen":
        cu = torch.tensor([0, 3, q.shape[0]], dtype=torch.int32)
        return wrap_ring_attn_varlen_func(q, k, v, cu, cu, causal=True, **options)
    function = wrap_ring_attn_func if name == "ring" else wrap_zigzag_attn_func
    return function(q, k, v, **options)


NAMES = ("ring", "zigzag", "varlen")


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_of_the_lse_alone(name):
    q, k, v = (x.requires_grad_() for x in qkv_of(name == "varlen"))
    _, lse = public_call(name, q, k, v, return_lse=True)
    (dq, dv) = torch.autograd.grad(lse.sum(), (q, v))
    assert dq.abs().sum() > 0 and torch.equal(dv, torch.zeros_like(v))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_some_of_the_inputs(name):
    q, k, v = qkv_of(name == "varlen")
    dout = make_dout(1, q, v)
    everything = [x.clone().requires_grad_() for x in (q, k, v)]
    public_call(name, *everything).backward(dout)
    for wanted in itertools.product((False, True), repeat=3):
        inputs = [x.clone().requires_grad_(flag) for x, flag in zip((q, k, v), wanted, strict=True)]
        out = public_call(name, *inputs)
        assert out.requires_grad == any(wanted)
        if any(wanted):
            out.backward(dout)
        for x, flag, full in zip(inputs, wanted, everything, strict=True):
            assert (x.grad is not None) == flag
            assert x.grad is None or torch.equal(x.grad, full.grad)


@pytest.mark.parametrize("name", NAMES)
def test_no_grad_and_inference_mode(name):
    q, k, v = qkv_of(name == "varlen")
    expected = public_call(name, q, k, v)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            out = public_call(name, q.clone().requires_grad_(), k, v)
        assert not out.requires_grad and torch.equal(out, expected)


def test_a_second_backward_accumulates():
    q, k, v = qkv_of(False)
    q.requires_grad_()
    out = wrap_ring_attn_func(q, k, v)
    out.sum().backward(retain_graph=True)
    once = q.grad.clone()
    out.sum().backward()
    assert torch.equal(q.grad, 2 * once)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    q, k, v = make_qkv(3, None if name == "varlen" else 1, 5, 5, 2, 1, 2, 3)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: public_call(name, *x), inputs)


@pytest.mark.parametrize("name", NAMES)
def test_compiled_equals_eager(name):
    """fullgraph: not one graph break in the forward or the backward."""
    q, k, v = qkv_of(name == "varlen")
    dout = make_dout(1, q, v)
    cu = torch.tensor([0, 3, 8], dtype=torch.int32)

    def step(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        if name == "varlen":
            return wrap_ring_attn_varlen_func(q, 2 * k, v, cu, cu, causal=True) * 3
        function = wrap_ring_attn_func if name == "ring" else wrap_zigzag_attn_func
        return function(q, 2 * k, v, window_size=(4, 0)) * 3

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = function(*inputs, cu)
        results.append([out, *torch.autograd.grad(out, inputs, dout)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


# Several ranks: shapes and dtypes of what every rank gets.


def results_of(ranks: list[int], cases: list[tuple]) -> list[list[tuple]]:
    """On one rank, per case: shape, dtype, contiguity of out, lse, and the gradients or None."""
    block = ranks.index(torch.distributed.get_rank())
    found = []
    for name, lens, dtype, exchange in cases:
        layout = "zigzag" if name == "zigzag order" else "contiguous"
        tokens = LAYOUTS[layout].for_shards(lens).shard_lens[block]
        batch = () if name == "varlen" else (2,)
        generator = torch.Generator().manual_seed(block)
        q, k, v = (
            torch.randn(*batch, tokens, heads, dim, generator=generator).to(dtype).requires_grad_()
            for heads, dim in ((4, 4), (2, 4), (2, 6))
        )
        options = {
            "process_group": ranks,
            "shard_lens": [
                LAYOUTS[layout].for_shards(lens).shard_lens[b] for b in range(len(lens))
            ],
            "exchange": exchange,
            "return_lse": True,
        }
        if name == "varlen":
            cu = torch.tensor([0, 2, 2, sum(lens)], dtype=torch.int64)
            out, lse = wrap_ring_attn_varlen_func(q, k, v, cu, cu, causal=True, **options)
        elif name == "ring":
            out, lse = wrap_ring_attn_func(q, k, v, **options)
        else:
            out, lse = wrap_zigzag_attn_func(q, k, v, **options, layout=layout)
        out.float().sum().backward()
        tensors = (out, lse, q.grad, k.grad, v.grad)
        found.append(
            [x if x is None else (*description(x)[:2], x.is_contiguous()) for x in tensors]
        )
    return found


@pytest.mark.parametrize("exchange", ["direct", "ring", "all_gather"])
def test_results_have_the_shape_and_dtype_of_the_inputs(pool, exchange):
    """An empty shard gets gradients of no rows, not None."""
    cases = [
        (name, lens, dtype, exchange)
        for name in ("ring", "zigzag", "zigzag order", "varlen")
        for lens in ([4, 4, 4], [0, 5, 3], [7, 0, 0], [0, 2, 0])
        for dtype in DTYPES
    ]
    shards = pool.run(3, results_of, cases)
    for block, number in itertools.product(range(3), range(len(cases))):
        name, lens, dtype, _ = cases[number]
        layout = "zigzag" if name == "zigzag order" else "contiguous"
        n = LAYOUTS[layout].for_shards(lens).shard_lens[block]
        b = () if name == "varlen" else (2,)
        lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        assert shards[block][number] == [
            ((*b, n, 4, 6), dtype, True),
            ((*b, 4, n), lse_dtype, True),
            ((*b, n, 4, 4), dtype, True),
            ((*b, n, 2, 4), dtype, True),
            ((*b, n, 2, 6), dtype, True),
        ], (block, cases[number])
