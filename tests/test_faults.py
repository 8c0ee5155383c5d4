"""Ranks that do not do the same: a right result, or an error on every rank that says who did what.

Every scenario runs in a group of its own, on ranks that all scenarios share, over gloo; those in
which all messages have one size run again without tags, as NCCL has none.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler_ring import set_step, wrap_ring_attn_func
from nnscaler_ring.core.kernels.torch_cpu import TorchCpu
from nnscaler_ring.core.ranks.calls import Bounds
from nnscaler_ring.core.ranks.groups import group_state, group_string
from nnscaler_ring.core.ranks.transport import Transport
from tests.core.attempts import Attempt, attempt, warm_up
from tests.ranks import run_fresh

BOUNDS = Bounds(beat=0.05, look=0.1, stay=0.3, warn=60.0, grace=1.0)
GROUP_SECONDS = 30.0
BOUND_SECONDS = 20.0  # of an error; far less than the group's timeout


def tensors(seed: int, tokens: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(10 * seed + dist.get_rank())
    heads = (4, 2, 2)
    return [
        torch.randn(1, tokens, h, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for h in heads
    ]


def forward(group: Any, seed: int, **options: Any) -> Tensor:
    return wrap_ring_attn_func(*tensors(seed), causal=False, process_group=group, **options)


def refuses_once(group: Any, me: int, exchange: str) -> None:
    """Rank 1 passes a wrong argument, catches its own error and goes on."""
    forward(group, 0, exchange=exchange)
    if me == 1:
        with pytest.raises(ValueError, match="softmax_scale"):
            forward(group, 1, exchange=exchange, softmax_scale=float("nan"))
    for seed in (1, 2, 3):
        forward(group, seed, exchange=exchange)


def skips_a_backward(group: Any, me: int, exchange: str) -> None:
    """Rank 1 does not run the backward pass of a step."""
    for seed in range(3):
        out = forward(group, seed, exchange=exchange)
        if (me, seed) != (1, 1):
            out.sum().backward()


def repeats_a_forward(group: Any, me: int, exchange: str) -> None:
    """Rank 1 runs one forward pass twice."""
    for seed in range(3):
        if (me, seed) == (1, 1):
            forward(group, seed, exchange=exchange)
        forward(group, seed, exchange=exchange).sum().backward()


def backwards_in_another_order(group: Any, me: int, exchange: str) -> None:
    """Two forwards of one plan; the backwards A, B on rank 0 and B, A on rank 1."""
    outs = [forward(group, seed, exchange=exchange) for seed in (0, 1)]
    for out in outs if me == 0 else outs[::-1]:
        out.sum().backward()


def no_gradient(group: Any, me: int, exchange: str) -> None:
    """Nothing of rank 1's q, k and v wants a gradient."""
    forward(group, 0, exchange=exchange).sum().backward()
    with torch.set_grad_enabled(me == 0):
        out = forward(group, 1, exchange=exchange)
    if me == 0:
        out.sum().backward()


def skips_a_step(group: Any, me: int, exchange: str) -> None:
    """Rank 1 skips a whole step before its first call; the steps were told."""
    for step in range(4):
        if (me, step) == (1, 1):
            continue
        set_step(group, step)
        forward(group, step, exchange=exchange).sum().backward()


def other_length(group: Any, me: int, exchange: str) -> None:
    """Agreed on 4 + 4 tokens; then rank 1 has 3."""
    forward(group, 0, exchange=exchange)
    qkv = tensors(1, tokens=3 if me == 1 else 4)
    wrap_ring_attn_func(*qkv, causal=False, process_group=group, exchange=exchange)


def kernel_fails(group: Any, me: int, exchange: str) -> None:
    """Rank 1's kernel fails in a call whose plan is old; rank 0 may have all it needs for that."""
    forward(group, 0, exchange=exchange).sum().backward()
    with pytest.MonkeyPatch.context() as monkeypatch:
        if me == 1:
            monkeypatch.setattr(TorchCpu, "forward", out_of_memory)
        out = forward(group, 1, exchange=exchange)
    out.sum().backward()


def out_of_memory(*args: Any, **kwargs: Any) -> Any:
    raise MemoryError("no memory left for the test")


def computes_for_long(group: Any, me: int, exchange: str) -> None:
    """Rank 1 computes, or saves, for much longer than all bounds but the group's timeout."""
    for seed in range(2):
        forward(group, seed, exchange=exchange).sum().backward()
        if me == 1:
            time.sleep(2.0)
    forward(group, 5, exchange=exchange, softmax_scale=0.3)  # a new plan


def two_threads(group: Any, me: int, exchange: str) -> None:
    """Two threads of every rank call one group at a time."""
    ends: list[Attempt] = []
    forward(group, 0, exchange=exchange)

    def call(seed: int) -> None:
        seeds = range(seed, seed + 40)
        ends.append(attempt(lambda: [forward(group, n, exchange=exchange) for n in seeds]))

    threads = [threading.Thread(target=call, args=(100 * n,), name=f"user {n}") for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for end in ends:
        if end.error:
            raise RuntimeError(f"{end.error}: {end.message}")


class Scenario(NamedTuple):
    """`expected`: words of every rank's error, "" where all must be right."""

    run: Callable[[Any, int, str], None]
    expected: str
    one_size: bool = True


SCENARIOS = [
    Scenario(refuses_once, "rank 1 refused its call of wrap_ring_attn_func: ValueError: softmax_"),
    Scenario(skips_a_backward, "the backward of call 3"),
    Scenario(repeats_a_forward, "call 4"),
    Scenario(backwards_in_another_order, "the backward of call"),
    Scenario(no_gradient, "whether any of q, k, v, bias and sinks wants a gradient"),
    Scenario(skips_a_step, "of step 2"),
    Scenario(other_length, "ranks disagree on shard_lens", one_size=False),
    Scenario(kernel_fails, "no memory left for the test"),
    Scenario(computes_for_long, ""),
    Scenario(two_threads, "thread"),
]


@contextmanager
def no_tags() -> Iterator[None]:
    """Messages are matched by their order alone, as over NCCL."""
    post = dist.batch_isend_irecv

    def post_without_tags(operations: list[dist.P2POp]) -> list[Any]:
        for operation in operations:
            operation.tag = 0
        return post(operations)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(dist, "batch_isend_irecv", post_without_tags)
        monkeypatch.setattr(Transport, "in_order", property(lambda self: True))
        yield


def run_scenarios(ranks: list[int]) -> dict[str, Attempt]:
    """How every scenario ends on this rank, over each kind of messages."""
    warm_up()
    me, found = dist.get_rank(), {}
    patient = dist.new_group(ranks, timeout=timedelta(seconds=120))
    for way, exchange in (("tags", "direct"), ("tags", "all_gather"), ("no tags", "direct")):
        for scenario in SCENARIOS:
            if way == "no tags" and not scenario.one_size:
                continue
            group = dist.new_group(ranks, timeout=timedelta(seconds=GROUP_SECONDS))
            group_state(group_string(group)).calls.bounds = BOUNDS
            dist.barrier(group=patient)
            run = lambda: scenario.run(group, me, exchange)  # noqa: B023, E731
            if way == "no tags":
                with no_tags():
                    end = attempt(run)
            else:
                end = attempt(run)
            found[f"{scenario.run.__name__}, {way}, {exchange}"] = end
            dist.barrier(group=patient)
    return found


def test_every_fault_is_named_on_every_rank():
    outcomes = run_fresh(2, run_scenarios, init="tcp", timeout_seconds=60.0, answer_seconds=300.0)
    assert [outcome.kind for outcome in outcomes] == ["result"] * 2, [
        outcome.describe() for outcome in outcomes
    ]
    expected = {scenario.run.__name__: scenario.expected for scenario in SCENARIOS}
    wrong = []
    for rank, outcome in enumerate(outcomes):
        for name, end in outcome.value.items():
            words = expected[name.partition(",")[0]]
            right = words in end.message and end.seconds < BOUND_SECONDS
            if not right or bool(end.error) != bool(words):
                wrong.append((rank, name, end))
    assert not wrong, "\n".join(map(str, wrong))
