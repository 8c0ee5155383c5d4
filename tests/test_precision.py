"""Ranks add next to no rounding error: float32, bfloat16 and float16 against one device."""

import itertools
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nnscaler_ring.core.kernels import AttentionKernel, Problem, kernel_refusals, select_kernel
from tests.cases import Case, run_case
from tests.core.kernels.test_reference import one_thread  # noqa: F401
from tests.core.plan.test_schedule import dense_problem
from tests.core.test_engine import SCALE
from tests.core.test_engine import run as run_in_one_process
from tests.one_gpu import attend_on_gpu
from tests.oracle import dense_gradients, make_dout, make_qkv, visible
from tests.ranks import RankPool
from tests.tolerances import (
    RATIO_MIN_TOKENS,
    RATIO_TO_ONE_DEVICE,
    RATIO_TO_ONE_ROUNDING,
    Tolerance,
    assert_as_good_as_one_device,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = 1080  # divides by 1 to 4 ranks
NAMES = ("out", "dq", "dk", "dv")
DOCUMENTS = (0, 700, 1001, 1002, TOKENS)

assert TOKENS >= RATIO_MIN_TOKENS


CALLS = (
    ("ring", True, (-1, -1)),
    ("ring", True, (300, 0)),
    ("ring", False, (-1, -1)),
    ("zigzag", True, (-1, -1)),
    ("varlen", True, (-1, -1)),
)
"""The op, causal, and window_size."""


def case_of(
    op: str,
    world_size: int,
    causal: bool,
    window_size: tuple[int, int],
    exchange: str,
    device: str = "cpu",
    kernel: str = "torch_cpu",
) -> Case:
    lens = (TOKENS // world_size,) * world_size
    return Case(
        op=op,
        exchange=exchange,
        world_size=world_size,
        causal=causal,
        window_size=window_size,
        heads=(2, 1),
        shard_lens=lens,
        shard_lens_k=lens,
        cu_seqlens_q=DOCUMENTS if op == "varlen" else None,
        cu_seqlens_k=DOCUMENTS if op == "varlen" else None,
        v_head_dim=32,
        head_dim=32,
        kernel=kernel if device == "cpu" else "auto",
        seed=2,
    )


def one_device(case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    """out, dq, dk, dv of one kernel call per document, on the CPU."""
    q, k, v, dout = (x.to(device) for x in case.inputs(dtype))
    if case.op != "varlen":
        return _attend(q, k, v, dout, case.causal, case.window_size)
    pieces = []
    for start, stop in itertools.pairwise(DOCUMENTS):
        tensors = (x[None, start:stop] for x in (q, k, v, dout))
        pieces.append([x[0] for x in _attend(*tensors, case.causal)])
    return [torch.cat(x) for x in zip(*pieces, strict=True)]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    causal: bool,
    window_size: tuple[int, int] = (-1, -1),
    scale: float | None = None,
) -> list[Tensor]:
    tokens = q.shape[1]
    if q.is_cuda:
        options = {"causal": causal, "window_size": window_size, "scale": scale}
        return [x.cpu() for x in attend_on_gpu(q, k, v, dout, **options)]
    mask = None
    if window_size != (-1, -1):
        hidden = ~visible(tokens, tokens, causal=causal, window_size=window_size)
        mask = torch.zeros(tokens, tokens, dtype=q.dtype).masked_fill(hidden, -torch.inf)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        attn_mask=mask,
        is_causal=causal and mask is None,
        enable_gqa=True,
        scale=scale,
    ).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def run_all(
    ranks: list[int], cases: list[tuple[Case, torch.dtype]], device: str
) -> list[list[Tensor]]:
    """On one rank: out, dq, dk, dv of its rows."""
    block = ranks.index(torch.distributed.get_rank())
    group = ranks if len(ranks) > 1 else None
    results = []
    for case, dtype in cases:
        out, _, *gradients = run_case(case, block, group, dtype, device)
        results.append([out, *gradients])
    return results


@pytest.fixture(params=["torch_cpu", "cpu_tiles"])
def kernel(request: pytest.FixtureRequest) -> AttentionKernel:
    """The CPU's kernels; the second where it is compiled."""
    shape = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 32, "v_head_dim": 32}
    problem = Problem("cpu", torch.float32, **shape)
    if reason := kernel_refusals(problem)[request.param]:
        pytest.skip(f"{request.param}: {reason}")
    return select_kernel(request.param, problem)


def emulate(
    layout: str, ranks: int, tensors: list[Tensor], kernel: AttentionKernel
) -> list[Tensor]:
    """out, dq, dk, dv of so many ranks in one process, causal; gradients are sent as they are."""
    problem = dense_problem(layout, layout, (tokens_of(tensors) // ranks,) * ranks, True, (-1, -1))
    outs, _, dqs, dks, dvs = run_in_one_process(problem, *tensors, kernel)
    order = torch.tensor([t for rank in problem.q_tokens for t in rank]).argsort()
    dtype = tensors[0].dtype
    return [torch.cat(x, 1)[:, order].to(dtype) for x in (outs, dqs, dks, dvs)]


def tokens_of(tensors: list[Tensor]) -> int:
    return tensors[0].shape[1]


@pytest.mark.parametrize(
    ("spread", "ratio"),
    [(1.0, RATIO_TO_ONE_DEVICE), (2.3, RATIO_TO_ONE_ROUNDING), (40.0, RATIO_TO_ONE_DEVICE)],
    ids=["usual logits", "sharp softmax", "logits of 200"],
)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_the_error_does_not_grow_to_64_ranks(
    layout: str, spread: float, ratio: Tolerance, kernel: AttentionKernel
) -> None:
    """`spread`: the standard deviation of the logits."""
    size = spread / (SCALE * 32**0.5)
    q, k, v = make_qkv(5, 1, 2048, 2048, 2, 1, 32)
    tensors = [x.to(torch.bfloat16) for x in (size * q, k, v, make_dout(5, q, v))]
    logits = torch.einsum(
        "bqhd,bkd->bhqk", *(x.double() for x in (tensors[0], tensors[1][:, :, 0]))
    )
    assert spread < 40 or logits.abs().max() * SCALE > 200
    dense = dense_gradients(*tensors, causal=True, softmax_scale=SCALE)
    reference = _attend(*tensors, True, scale=SCALE)
    for ranks in (1, 2, 8, 64):
        found = emulate(layout, ranks, tensors, kernel)
        for n, name in enumerate(NAMES):
            expected = [dense[0], *dense[2:]][n]
            what = f"{name} of {ranks} ranks, {layout}"
            assert_as_good_as_one_device(found[n], reference[n], expected, what, ratio)


@lru_cache
def references(
    op: str, causal: bool, window_size: tuple[int, int], dtype: torch.dtype, device: str
) -> tuple[list[Tensor], list[Tensor]]:
    """out, dq, dk, dv in float64 and by one device; the same for any number of ranks."""
    case = case_of(op, 1, causal, window_size, "direct")
    dense = dense_gradients(
        *case.inputs(dtype),
        causal=causal,
        window_size=window_size,
        cu_seqlens_q=case.cu_seqlens_q,
        cu_seqlens_k=case.cu_seqlens_k,
    )
    return [dense[0], *dense[2:]], one_device(case, dtype, device)


@pytest.mark.parametrize(
    ("world_size", "exchange"),
    [(1, "direct"), (2, "direct"), (3, "direct"), (4, "direct"), (4, "ring"), (4, "all_gather")],
)
def test_several_ranks_are_as_good_as_one_device(
    pool: RankPool, world_size: int, exchange: str, device: str, kernel: AttentionKernel
) -> None:
    if device == "cuda" and kernel.name != "torch_cpu":
        pytest.skip("the GPU's kernels are what runs there")
    cases = [
        (case_of(op, world_size, causal, window_size, exchange, device, kernel.name), dtype)
        for op, causal, window_size in CALLS
        for dtype in DTYPES
    ]
    shards = pool.run(world_size, run_all, cases, device, timeout=120)
    for number, (case, dtype) in enumerate(cases):
        expected, reference = references(case.op, case.causal, case.window_size, dtype, device)
        for n, name in enumerate(NAMES):
            actual = torch.cat([shard[number][n] for shard in shards], -3)
            assert_as_good_as_one_device(
                actual, reference[n], expected[n], f"{name} of {case} in {dtype}"
            )
