"""Correctness on this machine: every public op over ranks against dense float64 attention.

A rank computes the whole problem densely, calls the op with its own rows, and tells how far its
rows of out, softmax_lse and the gradients are off. Shards are uneven, 6 heads share 2 KV heads.

Source of dilated attention: Ding et al., "LongNet", arXiv 2307.02486.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nnscaler_ring.core.exchange import EXCHANGES
from nnscaler_ring.core.kernels import Problem
from nnscaler_ring.core.plan.layout import Contiguous, SequenceLayout, Zigzag
from nnscaler_ring.core.token_index import token_index
from nnscaler_ring.dilated_attn import wrap_dilated_attn_func
from nnscaler_ring.ring_attn import wrap_ring_attn_func
from nnscaler_ring.ring_attn_varlen import wrap_ring_attn_varlen_func
from nnscaler_ring.tools.launch import Rank, run_ranks
from nnscaler_ring.tools.machine import usable_kernel
from nnscaler_ring.zigzag_attn import wrap_zigzag_attn_func

OPS = ("ring", "zigzag", "zigzag order", "varlen", "dilated")
HEADS, KV_HEADS, HEAD_DIM, V_HEAD_DIM = 6, 2, 16, 16
TENSORS = ("out", "softmax_lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Limit:
    """How far results in a dtype may be off, and what is measured."""

    largest: float
    measure: str


LIMITS = {
    # Rounding is 1e-14 here; a mask that is wrong by one key shows at 1e-2.
    torch.float64: Limit(1e-10, "largest absolute error"),
    # Four times the error of one device's kernel.
    torch.float32: Limit(2e-6, "relative L2 error"),
    torch.bfloat16: Limit(2e-2, "relative L2 error"),
}

MASKS: dict[str, tuple[bool, tuple[int, int]]] = {
    "causal": (True, (-1, -1)),
    "full": (False, (-1, -1)),
    "causal, left 11": (True, (11, -1)),
    "left 40, right 5": (False, (40, 5)),
}
"""Name -> causal, window_size."""

QUICK_MASKS = ("causal", "left 40, right 5")

SEGMENT_LENGTHS, DILATION_RATES = (24, 70, 1 << 20), (1, 2, 5)
"""Of the branches of "dilated": shorter than a shard, across shards, and all tokens."""


@dataclass(frozen=True)
class Case:
    """One call of a public op."""

    op: str
    exchange: str
    mask: str
    dtype: torch.dtype
    tokens: int

    def cu_seqlens(self) -> list[int]:
        """Packed: an ordinary document, an empty one, one of a single token, and the rest."""
        if self.op != "varlen":
            return [0, self.tokens]
        third = self.tokens // 3
        return [0, third, third, third + 1, self.tokens]

    def is_possible(self) -> bool:
        """Whether the op has the mask: dilated attention has no windows."""
        return self.op != "dilated" or MASKS[self.mask][1] == (-1, -1)

    def layout(self, world_size: int) -> SequenceLayout:
        """Uneven shards, except where the op's order says what a rank holds."""
        if self.op == "zigzag order":
            return Zigzag(self.tokens, world_size)
        weights = [3 + 2 * (rank % 3) for rank in range(world_size)]
        edges = [sum(weights[:n]) * self.tokens // sum(weights) for n in range(world_size + 1)]
        return Contiguous(tuple(edges[n + 1] - edges[n] for n in range(world_size)))


def all_cases(ranks: int, *, quick: bool) -> list[Case]:
    """Everything with everything, or with `quick` fewer masks and shorter sequences."""
    # Beside any power of two. The long one is beyond the blocks that a kernel computes at once.
    tokens = 16 * ranks + 5 if quick else 300 * ranks + 5
    cases = (
        Case(op, exchange, mask, dtype, tokens)
        for op, mask, dtype, exchange in itertools.product(
            OPS, QUICK_MASKS if quick else MASKS, LIMITS, EXCHANGES
        )
    )
    return [case for case in cases if case.is_possible()]


def run_cases(
    cases: list[Case],
    *,
    ranks: int,
    device: str,
    on_case: Callable[[], None] = lambda: None,
) -> dict[Case, float]:
    """The largest error of each case over all ranks and tensors.

    Raises:
        ValueError: this machine cannot run so many ranks.
        RankError: an op raised.
    """

    def on_report(rank: int, value: object) -> None:
        if rank == 0:
            on_case()

    by_rank = run_ranks(ranks, errors_on_rank, cases, device=device, on_report=on_report)
    return {case: max(errors[n] for errors in by_rank) for n, case in enumerate(cases)}


def is_ok(case: Case, error: float) -> bool:
    """Whether an error is within the limit; NaN is not."""
    return error <= LIMITS[case.dtype].largest


def kernel_for(dtype: torch.dtype, device: str) -> str:
    """The kernel that is checked: what "auto" takes, else the one that computes anything."""
    return usable_kernel(Problem(device, dtype, HEADS, KV_HEADS, HEAD_DIM, V_HEAD_DIM))


def errors_on_rank(rank: Rank, cases: list[Case]) -> list[float]:
    """This rank's largest error in each case."""
    errors = []
    for case in cases:
        errors.append(_error(rank, case))
        rank.report(None)
    return errors


def _error(rank: Rank, case: Case) -> float:
    q, k, v, dout = _inputs(case.tokens, case.dtype)
    layout = case.layout(rank.world_size)
    rows = token_index(layout.positions(rank.rank))
    mine = [x[:, rows].to(rank.device) for x in (q, k, v, dout)]
    actual = _call(case, rank, layout, *mine)
    dilated = case.op == "dilated"
    expected = _dense(case.tokens, case.dtype, case.mask, tuple(case.cu_seqlens()), dilated)
    return max(
        error_of(x.cpu(), dense.index_select(-1 if name == "softmax_lse" else 1, rows), case.dtype)
        for name, x, dense in zip(TENSORS, actual, expected, strict=True)
    )


def error_of(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """What LIMITS bounds; infinite where only one of the two is infinite, or anything is NaN."""
    actual = actual.double()
    blind = expected.isinf()
    if actual.shape != expected.shape or not torch.equal(actual[blind], expected[blind]):
        return math.inf
    expected = expected.masked_fill(blind, 0)
    difference = actual.masked_fill(blind, 0) - expected
    if not difference.isfinite().all():
        return math.inf
    if dtype == torch.float64:
        return difference.abs().max().item()
    return (difference.norm() / expected.norm()).item()


def _call(
    case: Case, rank: Rank, layout: SequenceLayout, q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> list[Tensor]:
    """out, softmax_lse, dq, dk, dv of this rank's rows, as if not packed."""
    causal, window_size = MASKS[case.mask]
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    options: dict[str, Any] = {
        "causal": causal,
        "process_group": rank.group,
        "return_lse": True,
        "shard_lens": layout.shard_lens,
        "exchange": case.exchange,
        "kernel": kernel_for(case.dtype, rank.device.type),
    }
    if case.op == "dilated":
        out, lse = wrap_dilated_attn_func(q, k, v, SEGMENT_LENGTHS, DILATION_RATES, **options)
    elif case.op == "varlen":
        cu_seqlens = torch.tensor(case.cu_seqlens())
        out, lse = wrap_ring_attn_varlen_func(
            q[0], k[0], v[0], cu_seqlens, cu_seqlens, window_size=window_size, **options
        )
        out, lse = out[None], lse[None]
    elif case.op == "ring":
        out, lse = wrap_ring_attn_func(q, k, v, window_size=window_size, **options)
    else:
        order = "contiguous" if case.op == "zigzag" else "zigzag"
        out, lse = wrap_zigzag_attn_func(q, k, v, window_size=window_size, layout=order, **options)
    return [x.detach() for x in (out, lse, *torch.autograd.grad(out, (q, k, v), dout))]


@lru_cache(maxsize=8)
def _inputs(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, dout of the whole sequence, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM), (KV_HEADS, V_HEAD_DIM), (HEADS, V_HEAD_DIM))
    q, k, v, dout = (
        torch.randn(1, tokens, *shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in shapes
    )
    return q, k, v, dout


@lru_cache(maxsize=1)
def _dense(
    tokens: int, dtype: torch.dtype, mask: str, cu_seqlens: tuple[int, ...], dilated: bool = False
) -> tuple[Tensor, ...]:
    """TENSORS by the definition in float64, from the inputs as they are in `dtype`."""
    inputs = _inputs(tokens, dtype)
    q, k, v, dout = (x.double().requires_grad_(n < 3) for n, x in enumerate(inputs))
    wide_k, wide_v = (x.repeat_interleave(HEADS // KV_HEADS, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, wide_k) / math.sqrt(HEAD_DIM)
    # Every token sees itself in all masks of this file, so that no row is blind.
    masks = [_visible(tokens, mask, cu_seqlens)]
    if dilated:
        branches = zip(SEGMENT_LENGTHS, DILATION_RATES, strict=True)
        masks = [masks[0] & _used_together(tokens, *branch) for branch in branches]
    scores = torch.cat([scores.masked_fill(~m, -math.inf) for m in masks], dim=-1)
    wide_v = torch.cat([wide_v] * len(masks), dim=1)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), wide_v)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    return out.detach(), scores.detach().logsumexp(dim=-1), *gradients


def _visible(tokens: int, mask: str, cu_seqlens: tuple[int, ...]) -> Tensor:
    """Which query sees which key: bool [tokens, tokens]."""
    causal, (left, right) = MASKS[mask]
    token = torch.arange(tokens)
    document = torch.searchsorted(torch.tensor(cu_seqlens), token, right=True)
    ahead = token - token.unsqueeze(1)  # [query, key]: how far the key is ahead of the query
    visible = document == document.unsqueeze(1)
    if left >= 0:
        visible &= ahead >= -left
    if causal or right >= 0:
        visible &= ahead <= (0 if causal else right)
    return visible


def _used_together(tokens: int, segment: int, dilation: int) -> Tensor:
    """Which query may see which key in a branch of dilated attention: bool [heads, q, k]."""
    offset = torch.arange(HEADS) // (HEADS // KV_HEADS) % dilation
    token = torch.arange(tokens)
    used = token % segment % dilation == offset.unsqueeze(1)
    same = token // segment == (token // segment).unsqueeze(1)
    return used.unsqueeze(1) & used.unsqueeze(2) & same
