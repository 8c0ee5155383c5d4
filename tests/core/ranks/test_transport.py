"""A rank that is lost, or silent, is an error on every other rank in time; the op is named."""

import contextlib
import os
import re
import signal
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nnscaler_ring import (
    set_agreement_timeout,
    wrap_ring_attn_func,
    wrap_ring_attn_varlen_func,
    wrap_zigzag_attn_func,
)
from nnscaler_ring.core.kernels.torch_cpu import TorchCpu
from nnscaler_ring.core.ranks.transport import Transport
from nnscaler_ring.core.ranks.watch import Watch
from tests.core.attempts import Attempt, arguments, attempt, check_correct_call, warm_up
from tests.ranks import run_fresh

RING, ZIGZAG, VARLEN = wrap_ring_attn_func, wrap_zigzag_attn_func, wrap_ring_attn_varlen_func

GROUP_SECONDS = 5.0
VICTIM = 1
SILENT = (("direct", "forward"), ("direct", "backward"), ("ring", "backward"))
WAYS = {  # public function, exchange
    "direct": (RING, "direct"),
    "ring": (VARLEN, "ring"),
    "all_gather": (RING, "all_gather"),
    "relayout": (ZIGZAG, "direct"),
}


class Gone(BaseException):
    """Takes the silent rank out of the op in the middle of it."""


def call(way: str, group: Any, size: int) -> torch.Tensor:
    """A call in which every rank needs keys of every other."""
    op, exchange = WAYS[way]
    good = arguments(op, size)
    if op is VARLEN:
        good |= {name: torch.tensor([0, 4 * size]) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    good["k"].requires_grad_()
    return op(**good, causal=False, process_group=group, exchange=exchange)


def leave(monkeypatch: pytest.MonkeyPatch, how: Callable[..., Any]) -> None:
    """This rank leaves its next op where it would first send something."""
    monkeypatch.setattr(Transport, "post", how)
    monkeypatch.setattr(Transport, "_run", how)


def raise_gone(*args: Any, **kwargs: Any) -> Any:
    raise Gone


def new_groups(ranks: list[int]) -> list[tuple[str, Any, int]]:
    """One for each way and number of ranks: way, group, size; all make them, members use them."""
    me, found = dist.get_rank(), []
    for way in WAYS:
        for members in (ranks, [0, VICTIM], [VICTIM, 2]):
            group = dist.new_group(members, timeout=timedelta(seconds=GROUP_SECONDS))
            if me in members:
                found.append((way, group, len(members)))
    return found


def lose_a_rank(ranks: list[int]) -> dict[str, Attempt]:
    """3 ranks; rank 1 is silent in some calls, then dies after others; the others tell."""
    warm_up()
    me, found = dist.get_rank(), {}
    patient = dist.new_group(ranks, timeout=timedelta(seconds=60))

    for way, direction in SILENT:
        group = dist.new_group(ranks, timeout=timedelta(seconds=GROUP_SECONDS))
        out = call(way, group, 3) if direction == "backward" else None
        dist.barrier(group=patient)
        run = out.sum().backward if out is not None else lambda: call(way, group, 3)  # noqa: B023
        if me == VICTIM:
            with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(Gone):
                monkeypatch.setattr(Watch, "pass_failed", lambda *_: None)
                leave(monkeypatch, raise_gone)
                run()
        else:
            found[f"silent, {way}, {direction}"] = attempt(run)
        dist.barrier(group=patient)

    forward, backward = new_groups(ranks), new_groups(ranks)
    for way, group, size in forward:
        call(way, group, size)
    for way, group, size in backward:
        call(way, group, size).sum().backward()  # so that the next backward is an old plan
    outs = [(way, size, call(way, group, size)) for way, group, size in backward]
    fresh = dist.new_group(ranks)
    for group in (fresh, dist.group.WORLD):
        set_agreement_timeout(group, 1.0)
    dist.barrier(group=patient)
    if me == VICTIM:
        os._exit(3)
    for way, group, size in forward:
        found[f"lost, {way}, forward, {size}"] = attempt(lambda: call(way, group, size))  # noqa: B023
    for way, size, out in outs:
        found[f"lost, {way}, backward, {size}"] = attempt(out.sum().backward)
    found["agreement"] = attempt(lambda: call("ring", fresh, 3))
    found["group"] = attempt(lambda: call("ring", [0, 1, 2][: me + 2][-2:], 2))
    return found


@pytest.mark.full  # on a busy machine its ranks may take longer than its groups' timeout to compare
@pytest.mark.parametrize("init", ["file", "tcp"])
def test_survivors_name_the_op_and_the_lost_or_silent_rank(init):
    outcomes = run_fresh(3, lose_a_rank, init=init, timeout_seconds=20.0)
    assert [outcome.kind for outcome in outcomes] == ["result", "died", "result"], [
        outcome.describe() for outcome in outcomes
    ]
    for rank in (0, 2):
        found = outcomes[rank].value
        assert len(found) == len(SILENT) + 2 * 2 * len(WAYS) + 2
        for name, end in found.items():
            assert end.seconds < GROUP_SECONDS + 2.0, (name, end)
            if name == "agreement":
                assert re.search(
                    r"_func: rank [02] waited 1 s for rank\(s\) \[1\] to compare", end.message
                ), end
            elif name == "group":
                assert "process_group must be the same on all its ranks" in end.message, end
                assert "rank(s) [1] did not within 1 s" in end.message, end
            else:
                check_lost(name, end, rank)
    for name in outcomes[0].value:
        # Where three send in a circle, a survivor may first see the other one leave it.
        ends = [outcomes[rank].value[name].message for rank in (0, 2)]
        assert any(re.search(r"rank 1 |rank\(s\) \[1\]|ranks \[.*1.*\]", end) for end in ends), ends


def check_lost(name: str, end: Attempt, rank: int) -> None:
    kind, way, direction, *size = name.split(", ")
    assert end.error == "RuntimeError", (name, end)
    peers = "1" if size == ["2"] else "[012]"
    what = rf"(sending to|receiving from) rank {peers} \(\w+\).* failed: "
    pattern = f"^{WAYS[way][0].__name__} {direction}: {what}"
    assert re.search(pattern, end.message), (name, end.message)
    assert f"rank {rank} (" not in end.message, end
    if kind == "silent":
        assert end.seconds > GROUP_SECONDS - 0.5, end


# Dying in the middle of a pass, while the others wait.


def die(*args: Any, **kwargs: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_the_second_tile(*args: Any, **kwargs: Any) -> Any:
    TorchCpu.backward = die  # type: ignore[method-assign]
    return BACKWARD(*args, **kwargs)


BACKWARD = TorchCpu.backward


def die_in(ranks: list[int], way: str, direction: str) -> Attempt:
    """The last rank dies: before it sends anything, or between two tiles of its backward pass."""
    warm_up()
    dist.barrier()
    is_victim = dist.get_rank() == len(ranks) - 1
    if direction == "forward":
        if is_victim:
            leave(pytest.MonkeyPatch(), die)
        return attempt(lambda: call(way, ranks, len(ranks)))
    out = call(way, ranks, len(ranks))
    if is_victim:
        TorchCpu.backward = die_in_the_second_tile  # type: ignore[method-assign]
    return attempt(out.sum().backward)


@pytest.mark.parametrize(
    ("size", "way", "direction", "init"),
    [(2, "direct", "forward", "tcp"), (3, "ring", "backward", "file")],
)
def test_a_rank_that_dies_in_a_pass(size, way, direction, init):
    *outcomes, victim = run_fresh(
        size, die_in, way, direction, init=init, timeout_seconds=GROUP_SECONDS
    )
    assert victim.kind == "died" and victim.exit_code == -signal.SIGKILL, victim.describe()
    for rank, outcome in enumerate(outcomes):
        assert outcome.kind == "result", outcome.describe()
        assert outcome.value.seconds < GROUP_SECONDS + 2.0, outcome.value
        check_lost(f"lost, {way}, {direction}, {size}", outcome.value, rank)


# The rank that hosts the TCP store.


def lose_the_store(ranks: list[int], port: int, how: str) -> dict[str, Attempt]:
    """Rank 0 hosts the store of a second world, and dies or stops."""
    warm_up()
    me = dist.get_rank()
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=me,
        world_size=2,
        timeout=timedelta(seconds=20),
    )
    check_correct_call([0, 1], 0.1)
    check_correct_call([1, 0], 0.1)
    for group in ([0, 1], dist.group.WORLD):
        set_agreement_timeout(group, 1.0)
    pid = torch.tensor(os.getpid())
    dist.broadcast(pid, 0)
    if me == 0:
        os.kill(os.getpid(), signal.SIGKILL if how == "dies" else signal.SIGSTOP)
    good = arguments(RING)
    found = {
        "agreement": attempt(lambda: RING(**good, process_group=[0, 1])),
        "group": attempt(lambda: RING(**good, process_group=[1])),
        "refusal": attempt(lambda: RING(**good, window_size=(-2, 0), process_group=[1, 0])),
    }
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid.item(), signal.SIGKILL)
    return found


@pytest.mark.parametrize("how", ["dies", "stops"])
def test_the_rank_that_hosts_the_store_is_lost(how):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    dead, outcome = run_fresh(2, lose_the_store, port, how)
    assert dead.kind == "died" and outcome.kind == "result", (dead.describe(), outcome.describe())
    ends = outcome.value
    assert all(end.seconds < 5.0 for end in ends.values()), ends
    assert ends["agreement"].error == ends["group"].error == "RuntimeError", ends
    assert ends["agreement"].message.startswith(
        "wrap_ring_attn_func: the store of process_group=[0, 1] failed while the ranks compared a "
        "new plan; the rank that hosts it may be lost: "
    ), ends
    assert "process_group=[1] could not be made, a rank may be lost: " in ends["group"].message
    # The user's own mistake is not hidden.
    assert ends["refusal"].error == "ValueError", ends
    assert "window_size entries must be -1 or >= 0, got (-2, 0)" in ends["refusal"].message
