"""A lost rank, or one that runs out of memory between messages: an error on every rank, in time."""

import os

import pytest
import torch
import torch.distributed as dist

from nnscaler_ring.core.kernels import torch_cpu
from nnscaler_ring.dilated import RingMultiheadDilatedAttention
from tests.ranks import run_fresh


def fail_in_the_middle(ranks, how):
    """Rank 1 fails inside the op, after the ranks have agreed; the second call."""
    torch.manual_seed(0)
    layer = RingMultiheadDilatedAttention(
        12, 3, [64], [1], process_group=ranks, enable_fault_tolerance=True
    )
    x = torch.randn(1, 16, 12)
    layer(x, is_causal=False)
    if dist.get_rank() == 1:

        def forward(*args, **kwargs):
            if how == "dies":
                os._exit(1)
            raise torch.OutOfMemoryError("out of memory, here only")

        torch_cpu.TorchCpu.forward = forward
    return layer(x, is_causal=False)[0]


@pytest.mark.full
@pytest.mark.parametrize("how", ["dies", "runs out of memory"])
def test_every_rank_raises(how):
    outcomes = run_fresh(3, fail_in_the_middle, how, timeout_seconds=4.0)
    assert all(outcome.kind in ("error", "died") for outcome in outcomes), outcomes
    assert all(outcome.seconds < 12 for outcome in outcomes)
    if how == "dies":
        assert [outcome.kind for outcome in outcomes] == ["error", "died", "error"]
    else:
        assert outcomes[1].error == "OutOfMemoryError"
