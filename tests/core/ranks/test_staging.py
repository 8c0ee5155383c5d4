"""Messages through host memory: the same bits, and the backend sees copies alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler_ring import wrap_dilated_attn_func, wrap_ring_attn_func, zigzag_shard
from nnscaler_ring.core.ranks import transport
from nnscaler_ring.core.ranks.groups import ALONE, group_state
from nnscaler_ring.core.ranks.staging import (
    AsItIs,
    ThroughHost,
    carriage_of,
    device_of_numbers,
)
from nnscaler_ring.core.ranks.transport import connect
from tests.cases import EXCHANGES, Case, all_cases, run_cases, sample

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Watched(ThroughHost):
    """Remembers the host memory that it gave out."""

    def __init__(self) -> None:
        self.host: set[int] = set()

    def incoming(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        copies = super().incoming(tensors)
        self.host |= {x.data_ptr() for x in copies}
        return copies


@contextmanager
def forced_through_host() -> Iterator[list[int]]:
    """Stage CPU tensors as if they were on a GPU; yields the number of tensors moved, in a list."""
    watched, moved = Watched(), [0]

    def check(*tensors: Tensor) -> None:
        assert all(x.data_ptr() in watched.host for x in tensors), "gloo got a device's memory"
        moved[0] += len(tensors)

    def watch(collective: Any) -> Any:
        def run(output: Tensor, x: Tensor, **options: Any) -> Any:
            check(output, x)
            return collective(output, x, **options)

        return run

    def batch(operations: list[dist.P2POp]) -> Any:
        check(*(operation.tensor for operation in operations))
        return BATCH(operations)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(transport, "carriage_of", lambda group, device: watched)
        monkeypatch.setattr(dist, "batch_isend_irecv", batch)
        for name in ("ALL_GATHER", "REDUCE_SCATTER"):
            monkeypatch.setattr(transport, name, watch(getattr(transport, name)))
        yield moved


BATCH = dist.batch_isend_irecv


def run_everything(ranks: list[int], cases: list[Case]) -> list[list[Tensor]]:
    """Attention with every exchange, dropout, dilated attention, a relayout."""
    results = run_cases(ranks, cases)
    q, k, v = torch.randn(3, 1, 6, 2, 4, generator=torch.Generator().manual_seed(5)).unbind(0)
    dropped = wrap_ring_attn_func(q, k, v, dropout_p=0.5, dropout_seed=7, process_group=ranks)
    dilated = wrap_dilated_attn_func(q, k, v, [4, 18], [1, 3], process_group=ranks)
    return [*results, [dropped, dilated, zigzag_shard(q, process_group=ranks, dim=1)]]


def run_both_ways(ranks: list[int], cases: list[Case]) -> tuple[list[Any], list[Any], int]:
    plain = run_everything(ranks, cases)
    with forced_through_host() as moved:
        staged = run_everything(ranks, cases)
    return plain, staged, moved[0]


def test_staged_results_are_the_same_bits(pool):
    cases = [case for case in sample(all_cases(0), 150, seed=3) if case.world_size == 3]
    assert {case.exchange for case in cases} == {*EXCHANGES}
    for plain, staged, moved in pool.run(3, run_both_ways, cases):
        assert moved > 2 * len(cases)
        for results, others in zip(plain, staged, strict=True):
            for x, y in zip(results, others, strict=True):
                assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("config", "device", "expected"),
    [
        ("cpu:gloo,cuda:gloo", CPU, AsItIs),
        ("cpu:gloo,cuda:gloo", CUDA, ThroughHost),
        ("cpu:gloo", CUDA, ThroughHost),
        ("cuda:nccl", CUDA, AsItIs),
        ("cpu:gloo,cuda:nccl", CUDA, AsItIs),
        ("cpu:gloo,cuda:nccl", CPU, AsItIs),
    ],
)
def test_gloo_never_gets_cuda_memory(monkeypatch, config, device, expected):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    assert type(carriage_of(None, device)) is expected


def test_a_group_that_serves_no_such_device_is_refused(monkeypatch):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    with pytest.raises(ValueError, match="process_group must have a backend for cpu tensors"):
        carriage_of(None, CPU)


def test_numbers_of_the_host_stay_there_if_they_can(monkeypatch):
    for config, expected in (("cpu:gloo,cuda:nccl", CPU), ("cuda:nccl", CUDA)):
        monkeypatch.setattr(dist, "get_backend_config", lambda group, config=config: config)
        assert device_of_numbers(None, CUDA) == expected


def connected_by_the_first_call(ranks: list[int]) -> tuple[int, int]:
    """A group that says it is NCCL: how many collectives connect it, on a rank without tokens."""
    calls = [0]

    def all_reduce(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        return ALL_REDUCE(*args, **options)

    me = ranks.index(dist.get_rank())
    q = torch.ones(1, 4 * (me == 0), 1, 2)
    group = dist.new_group(ranks)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(transport, "backends_of", lambda group: {"cpu": "nccl"})
        monkeypatch.setattr(dist, "all_reduce", all_reduce)
        for causal in (True, False):
            wrap_ring_attn_func(q, q, q, causal=causal, process_group=group, shard_lens=[4, 0])
        connect(ALONE, CPU)
    return calls[0], len(group_state(group.group_name).connected)


ALL_REDUCE = dist.all_reduce


def test_all_ranks_connect_an_nccl_group_once(pool):
    assert pool.run(2, connected_by_the_first_call, ranks=[0, 1]) == [(1, 1), (1, 1)]
