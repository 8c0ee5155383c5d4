"""Several GPUs over NCCL: right, without a wait of the host, without new memory in a later step."""

import pytest
import torch
from torch import Tensor

from nnscaler_ring import wrap_zigzag_attn_func
from nnscaler_ring.launch import Rank, run_ranks
from tests.cases import EXCHANGES, Case, all_cases, check_results, run_cases, sample

RANKS = 2

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs 2 CUDA devices"),
]


def results(rank: Rank, cases: list[Case]) -> list[list[Tensor]]:
    return run_cases(rank.group, cases, "cuda")


def test_sample_of_the_product_equals_dense():
    cases = [case for case in sample(all_cases(0), 400, seed=4) if case.world_size == RANKS]
    cases = [case.on("cuda") for case in cases]
    check_results(cases, run_ranks(RANKS, results, cases, device="cuda"))


def train_steps(rank: Rank, exchange: str, layout: str) -> list[int]:
    """The allocator's segments after each of some steps, in which the host must not wait."""
    q, k, v = torch.randn(3, 1, 4096, 8, 64, dtype=torch.bfloat16, device=rank.device).unbind(0)
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    segments = []
    for number in range(4):
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        out = wrap_zigzag_attn_func(
            q, k, v, process_group=rank.group, exchange=exchange, layout=layout
        )
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        torch.cuda.set_sync_debug_mode("default")
        segments.append(torch.cuda.memory_stats()["segment.all.allocated"])
    return segments


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_steps_do_not_wait_and_reuse_their_memory(exchange, layout):
    for segments in run_ranks(RANKS, train_steps, exchange, layout, device="cuda"):
        assert segments[1] == segments[-1], segments
