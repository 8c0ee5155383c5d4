"""The public ops on one GPU: every option and kernel against the same call on a CPU in float64, and
half precision by ratio to torch's flash-attention. The CPU is held against the oracle elsewhere.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from nnscaler_ring import (
    wrap_dilated_attn_func,
    wrap_ring_attn_func,
    wrap_ring_attn_varlen_func,
    wrap_zigzag_attn_func,
)
from nnscaler_ring.core.kernels import KERNELS, Problem, kernel_refusals, select_kernel
from tests.core.plan.test_schedule import dense_problem, packed_problem
from tests.core.test_engine import SCALE
from tests.core.test_engine import run as run_in_one_process
from tests.one_gpu import attend_on_gpu
from tests.oracle import dense_gradients, make_dout, make_qkv
from tests.tolerances import (
    RATIO_MIN_TOKENS,
    RATIO_TO_ONE_ROUNDING,
    assert_as_good_as_one_device,
    assert_close_float64,
    assert_close_relative,
)

pytestmark = pytest.mark.cuda

DEVICE = "cuda"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALF = DTYPES[2:]
CUDA_KERNELS = [name for name in KERNELS if name != "torch_cpu"]
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 40  # a head dim that kernels pad
CU_SEQLENS = torch.tensor([0, 7, 7, 8, 150, 301], dtype=torch.int32)
TOKENS = 301

Call = tuple[Callable[..., Any], dict[str, Any]]

CALLS: dict[str, Call] = {
    "causal": (wrap_ring_attn_func, {}),
    "full": (wrap_ring_attn_func, {"causal": False}),
    "window": (wrap_ring_attn_func, {"window_size": (33, -1)}),
    "two-sided": (wrap_ring_attn_func, {"causal": False, "window_size": (20, 45)}),
    "zigzag": (wrap_zigzag_attn_func, {"window_size": (50, 0)}),
    "packed": (wrap_ring_attn_varlen_func, {"causal": True}),
    "packed window": (wrap_ring_attn_varlen_func, {"causal": True, "window_size": (5, -1)}),
    "packed full": (wrap_ring_attn_varlen_func, {}),
    "dilated": (
        wrap_dilated_attn_func,
        {"segment_lengths": [64, 301], "dilation_rates": [1, 2]},
    ),
}
OPTIONS: dict[str, Call] = {
    "softcap": (wrap_ring_attn_func, {"softcap": 2.0}),
    "alibi": (wrap_ring_attn_func, {"alibi_slopes": torch.arange(HEADS) / 8}),
    "bias": (wrap_ring_attn_func, {"bias": True}),
    "sinks": (wrap_ring_attn_func, {"sinks": torch.arange(HEADS) / 4}),
    "dropout": (wrap_ring_attn_func, {"dropout_p": 0.3, "dropout_seed": 5}),
    "packed softcap": (wrap_ring_attn_varlen_func, {"softcap": 2.0, "causal": True}),
    "packed dropout": (wrap_ring_attn_varlen_func, {"dropout_p": 0.3, "dropout_seed": 5}),
}


def needs(kernel: str, dtype: torch.dtype, **options: bool) -> None:
    """Skip, with the kernel's own reason, what it does not do on this machine."""
    problem = Problem(DEVICE, dtype, HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM, **options)
    reason = kernel_refusals(problem)[kernel]
    if reason is not None:
        pytest.skip(f"{kernel}: {reason}")


def inputs(packed: bool, dtype: torch.dtype, tokens: int = TOKENS) -> list[Tensor]:
    """q, k, v, dout, dlse, bias, rounded to the dtype."""
    batch = None if packed else 2
    q, k, v = make_qkv(3, batch, tokens, tokens, HEADS, KV_HEADS, HEAD_DIM)
    dlse = torch.randn(q.shape[:-1]).transpose(-1, -2).contiguous() / 4
    bias = torch.randn(1, HEADS, tokens, tokens)
    return [x.to(dtype).double() for x in (q, k, v, make_dout(3, q, v), dlse, bias)]


def results(
    call: Call, tensors: list[Tensor], device: str, dtype: torch.dtype, **more: Any
) -> dict[str, Tensor]:
    """out, lse and all gradients of one call."""
    op, options = call
    q, k, v, dout, dlse, bias = (x.to(device, dtype) for x in tensors)
    wanted = {"q": q, "k": k, "v": v}
    options = {
        name: x.to(device, dtype) if isinstance(x, Tensor) else x for name, x in options.items()
    }
    if "bias" in options:
        wanted["bias"] = options["bias"] = bias
    if "sinks" in options:
        wanted["sinks"] = options["sinks"] = options["sinks"].clone()
    for x in wanted.values():
        x.requires_grad_()
    positional = [q, k, v]
    if op is wrap_ring_attn_varlen_func:
        positional += [CU_SEQLENS, CU_SEQLENS]
    out, lse = op(*positional, return_lse=True, **options, **more)
    gradients = torch.autograd.grad((out, lse), list(wanted.values()), (dout, dlse.to(lse.dtype)))
    names = [f"d{name}" for name in wanted]
    return {"out": out, "lse": lse} | dict(zip(names, gradients, strict=True))


def check(call: Call, dtype: torch.dtype, **more: Any) -> None:
    tensors = inputs(call[0] is wrap_ring_attn_varlen_func, dtype)
    found = results(call, tensors, DEVICE, dtype, **more)
    wanted = results(call, tensors, "cpu", torch.float64)
    for name, expected in wanted.items():
        actual = found[name].cpu()
        if dtype == torch.float64:
            assert_close_float64(actual, expected, name)
        else:
            kernel = more.get("kernel", "auto")
            assert_close_relative(actual.to(dtype), expected, name, kernel=kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*CALLS, *OPTIONS])
def test_auto_equals_the_cpu(name, dtype):
    check((CALLS | OPTIONS)[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", CUDA_KERNELS)
@pytest.mark.parametrize("name", [*CALLS, "softcap", "packed softcap"])
def test_every_kernel_equals_the_cpu(name, kernel, dtype):
    needs(kernel, dtype, softcap="softcap" in name)
    check((CALLS | OPTIONS)[name], dtype, kernel=kernel)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kernel", CUDA_KERNELS)
@pytest.mark.parametrize("name", ["causal", "window", "packed"])
def test_deterministic_repeats_every_bit(name, kernel, dtype):
    needs(kernel, dtype, deterministic=True)
    call = CALLS[name]
    tensors = inputs(call[0] is wrap_ring_attn_varlen_func, dtype)
    first, *others = (
        results(call, tensors, DEVICE, dtype, kernel=kernel, deterministic=True) for _ in range(5)
    )
    for other in others:
        assert all(torch.equal(first[x], other[x]) for x in first)


@pytest.mark.parametrize("kernel", CUDA_KERNELS)
@pytest.mark.parametrize("name", ["causal", "window", "packed"])
def test_a_step_does_not_wait_for_the_device(name, kernel):
    """After the first call, which makes the bounds of the segments."""
    needs(kernel, torch.bfloat16)
    call = CALLS[name]
    tensors = inputs(call[0] is wrap_ring_attn_varlen_func, torch.bfloat16)
    options = {name: x for name, x in call[1].items() if not isinstance(x, Tensor)}
    q, k, v = (x.to(DEVICE, torch.bfloat16).requires_grad_() for x in tensors[:3])
    bounds = [CU_SEQLENS] * 2 if call[0] is wrap_ring_attn_varlen_func else []
    dout = tensors[3].to(DEVICE, torch.bfloat16)

    def step() -> None:
        out = call[0](q, k, v, *bounds, kernel=kernel, **options)
        torch.autograd.grad(out, (q, k, v), dout)

    step()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


# Many ranks in one process: several tiles, merged, as good as one device.

LONG = 1024  # of whole blocks for cuDNN, also in halves of a rank
DOCUMENTS = (0, 700, 1001, 1002, LONG)
assert LONG >= RATIO_MIN_TOKENS


def one_device(tensors: list[Tensor], bounds: tuple[int, ...]) -> list[Tensor]:
    """out, dq, dk, dv of torch's flash-attention, document by document, causal."""
    pieces = [
        attend_on_gpu(*(x[:, start:stop] for x in tensors), causal=True, scale=SCALE)
        for start, stop in pairwise(bounds)
    ]
    return [torch.cat(x, dim=1) for x in zip(*pieces, strict=True)]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kernel", CUDA_KERNELS)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "packed"])
def test_four_ranks_are_as_good_as_one_device(layout, kernel, dtype):
    needs(kernel, dtype)
    problem = Problem(DEVICE, dtype, HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM)
    lens = [LONG // 4] * 4
    bounds = DOCUMENTS if layout == "packed" else (0, LONG)
    if layout == "packed":
        schedule = packed_problem(
            "contiguous", "contiguous", lens, lens, bounds, bounds, True, (-1, -1)
        )
    else:
        schedule = dense_problem(layout, layout, lens, True, (-1, -1))
    q, k, v = make_qkv(4, 1, LONG, LONG, HEADS, KV_HEADS, HEAD_DIM, dtype=dtype)
    tensors = [x.to(DEVICE) for x in (q, k, v, make_dout(4, q, v))]
    outs, _, dqs, dks, dvs = run_in_one_process(schedule, *tensors, select_kernel(kernel, problem))
    order = torch.tensor([t for rank in schedule.q_tokens for t in rank]).argsort()
    found = [torch.cat(x, dim=1).cpu()[:, order].to(dtype) for x in (outs, dqs, dks, dvs)]
    expected = [x.unsqueeze(0) for x in _dense(tensors, bounds)]
    for name, actual, reference, wanted in zip(
        ("out", "dq", "dk", "dv"), found, one_device(tensors, bounds), expected, strict=True
    ):
        assert_as_good_as_one_device(
            actual, reference.cpu(), wanted, f"{name}, {kernel}", RATIO_TO_ONE_ROUNDING
        )


def _dense(tensors: list[Tensor], bounds: tuple[int, ...]) -> list[Tensor]:
    """out, dq, dk, dv of the oracle."""
    q, k, v, dout = (x[0].cpu() for x in tensors)
    options = {"softmax_scale": SCALE, "causal": True}
    out, _, *gradients = dense_gradients(
        q, k, v, dout, cu_seqlens_q=bounds, cu_seqlens_k=bounds, **options
    )
    return [out, *gradients]
