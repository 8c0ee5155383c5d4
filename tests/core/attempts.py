"""Calls that may fail, on one device or on a rank, and how they ended."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler_ring import (
    set_agreement_timeout,
    traffic,
    wrap_ring_attn_func,
    wrap_ring_attn_varlen_func,
)
from nnscaler_ring.core.ranks.calls import Calls, Pass
from nnscaler_ring.core.ranks.groups import group_of, group_state, group_string
from tests.oracle import make_qkv

TOKENS = 4  # per rank, in `arguments`


class Attempt(NamedTuple):
    """How a call ended on one rank; `error` is "" if it returned."""

    error: str
    message: str
    seconds: float
    sent: int  # payload bytes


def attempt(call: Callable[[], Any], group: Any = None) -> Attempt:
    """Run `call`, and count what this rank sent over the group meanwhile."""
    before = traffic(group).total_bytes
    start = time.perf_counter()
    error = message = ""
    try:
        call()
    except Exception as raised:
        error, message = type(raised).__name__, str(raised)
    seconds = time.perf_counter() - start
    return Attempt(error, message, seconds, traffic(group).total_bytes - before)


def arguments(op: Callable[..., Any], world_size: int = 1) -> dict[str, Any]:
    """Arguments that every public attention function accepts, the same tensors on every rank."""
    packed = op is wrap_ring_attn_varlen_func
    q, k, v = make_qkv(0, None if packed else 2, TOKENS, TOKENS, 4, 2, 8)
    tensors: dict[str, Tensor] = {"q": q, "k": k, "v": v}
    if packed:
        total = TOKENS * world_size
        tensors["cu_seqlens_q"] = torch.tensor([0, 1, 1, total], dtype=torch.int32)
        tensors["cu_seqlens_k"] = torch.tensor([0, 1, 1, total])
    return tensors


def warm_up() -> None:
    """Torch's first call of a custom op imports seconds' worth of modules."""
    wrap_ring_attn_func(**arguments(wrap_ring_attn_func))


@contextmanager
def all_calls_have_one_number() -> Iterator[None]:
    """For opcheck, which compares all results of an op in several calls."""
    begin = Calls.begin

    def begin_first(*args: Any, **kwargs: Any) -> Pass:
        made = begin(*args, **kwargs)
        made.number = 1
        return made

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Calls, "begin", begin_first)
        yield


def line_up(ranks: list[int]) -> None:
    """Wait until all ranks are here, and forget the plans on which the group has agreed before.

    On a busy machine importing alone may part the ranks by seconds.
    """
    warm_up()
    set_agreement_timeout(dist.group.WORLD, 25.0)
    set_agreement_timeout(ranks, 25.0)
    dist.barrier(group=group_of(group_string(ranks)))
    group_state(group_string(ranks)).agreed_plans.clear()


def check_correct_call(ranks: Any, softmax_scale: float) -> None:
    """A call equals the same on one device; the plan is new if the scale is."""
    good = arguments(wrap_ring_attn_func) | {"softmax_scale": softmax_scale, "causal": False}
    size = len(ranks) if isinstance(ranks, list) else ranks.size()
    whole = good | {name: torch.cat([good[name]] * size, dim=1) for name in ("q", "k", "v")}
    out = wrap_ring_attn_func(**good, process_group=ranks)
    torch.testing.assert_close(out, wrap_ring_attn_func(**whole)[:, :TOKENS])
