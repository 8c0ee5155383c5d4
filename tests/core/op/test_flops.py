"""FlopCounterMode counts the ops as it counts torch's own attention."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from nnscaler_ring import wrap_dilated_attn_func, wrap_ring_attn_func, wrap_ring_attn_varlen_func
from tests.oracle import make_qkv

TOKENS, HEADS, KV_HEADS, DIM = 12, 6, 2, 4


def counted(call) -> tuple[int, int]:
    """FLOPs of the forward and of the backward pass."""
    with FlopCounterMode(display=False) as forward:
        out = call()
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def tensors(packed: bool = False):
    made = make_qkv(0, None if packed else 2, TOKENS, TOKENS, HEADS, KV_HEADS, DIM, 5)
    return tuple(x.float().requires_grad_() for x in made)


def test_one_device_counts_as_torch_does():
    """Its formulas, as it has none for its own fused kernel on the CPU."""
    q, k, v = tensors()
    q_shape, k_shape, v_shape = (
        [2, HEADS, TOKENS, x.shape[-1]] for x in (q, k, v)
    )  # heads first; each KV head counts for the query heads that share it
    assert counted(lambda: wrap_ring_attn_func(q, k, v)) == (
        sdpa_flop_count(q_shape, k_shape, v_shape),
        sdpa_backward_flop_count([2, HEADS, TOKENS, 5], q_shape, k_shape, v_shape),
    )


def test_documents_count_their_own_pairs():
    q, k, v = tensors(packed=True)
    cu = torch.tensor([0, 1, 5, 5, TOKENS])
    pairs = HEADS * (1 + 16 + 49)
    ours = counted(lambda: wrap_ring_attn_varlen_func(q, k, v, cu, cu))
    assert ours == (2 * pairs * (DIM + 5), 2 * pairs * (3 * DIM + 2 * 5))


def test_dilated_attention_counts_what_its_branches_use():
    q, k, v = tensors()
    pairs = 2 * HEADS * (TOKENS * 4 + TOKENS * TOKENS // 4)
    ours = counted(lambda: wrap_dilated_attn_func(q, k, v, [4, 100], [1, 2]))
    assert ours == (2 * pairs * (DIM + 5), 2 * pairs * (3 * DIM + 2 * 5))


def on_a_rank(ranks: list[int], lens: list[int]) -> tuple[int, int]:
    block = ranks.index(torch.distributed.get_rank())
    q, k, v = (x.detach().split(lens, dim=1)[block].requires_grad_() for x in tensors())
    return counted(lambda: wrap_ring_attn_func(q, k, v, process_group=ranks, shard_lens=lens))


@pytest.mark.parametrize("lens", [[4, 4, 4], [7, 0, 5]])
def test_ranks_add_up_to_one_device(pool, lens):
    q, k, v = tensors()
    whole = counted(lambda: wrap_ring_attn_func(q, k, v))
    parts = pool.run(3, on_a_rank, lens)
    assert tuple(map(sum, zip(*parts, strict=True))) == whole


@pytest.mark.parametrize("first", ["nnscaler_ring", "torch.utils.flop_counter"])
def test_either_import_may_come_first(first):
    program = (
        f"import {first}, nnscaler_ring, torch\n"
        "from torch.utils.flop_counter import flop_registry\n"
        "print(torch.ops.nnscaler_ring.attention in flop_registry)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], text=True, capture_output=True, timeout=120, check=False
    )
    assert done.stdout == "True\n", done.stderr
