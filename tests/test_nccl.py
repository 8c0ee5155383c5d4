"""Over NCCL: right, without a wait of the host, without new memory in a later step.

One GPU is enough for messages of a rank to itself; ranks that talk to each other need one each.
"""

import pytest
import torch
from torch import Tensor

from nnscaler_ring import wrap_zigzag_attn_func
from nnscaler_ring.core.ranks.groups import Traffic, find_place, group_string
from nnscaler_ring.core.ranks.transport import Message, Transport, connect
from nnscaler_ring.tools.launch import Rank, run_ranks
from tests.cases import EXCHANGES, Case, all_cases, check_results, run_cases, sample

RANKS = 2

pytestmark = pytest.mark.cuda

needs_two = pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs 2 CUDA devices")


def posts_to_itself(rank: Rank) -> list[list[bool]]:
    """Whether what was sent arrived: several dtypes in one post, and posts one after another."""
    group = group_string(rank.group)
    connect(group, rank.device)
    transport = Transport(find_place(group), Traffic(), "op", 1)
    assert transport.in_order
    found = []
    for number in range(3):
        dtypes = (torch.bfloat16, torch.float32, torch.float64, torch.float16)
        sent = [torch.full((1 << 20,), number + 0.5, device=rank.device, dtype=x) for x in dtypes]
        received = [torch.zeros_like(x) for x in sent]
        torch.cuda.set_sync_debug_mode("error")
        transfer = transport.post(
            "gradient",
            [Message(0, x) for x in sent],
            [Message(0, x) for x in received],
        )
        transfer.wait()
        # What is done now must not reach what is still being sent.
        arrived = [x.clone() for x in received]
        for x in (*sent, *received):
            x.fill_(-1)
        torch.cuda.set_sync_debug_mode("default")
        found.append([bool((x == number + 0.5).all()) for x in arrived])
    whole = transport.all_gather("forward_kv", arrived[0])
    share = transport.reduce_scatter("gradient", whole)
    return [*found, [torch.equal(share, arrived[0])]]


def test_messages_of_a_rank_to_itself():
    (found,) = run_ranks(1, posts_to_itself, device="cuda")
    assert found == [[True] * 4] * 3 + [[True]]


def results(rank: Rank, cases: list[Case]) -> list[list[Tensor]]:
    return run_cases(rank.group, cases, "cuda")


@needs_two
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


@needs_two
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_steps_do_not_wait_and_reuse_their_memory(exchange, layout):
    for segments in run_ranks(RANKS, train_steps, exchange, layout, device="cuda"):
        assert segments[1] == segments[-1], segments
