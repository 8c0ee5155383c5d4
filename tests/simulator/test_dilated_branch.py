"""A dilated branch over many ranks, simulated, against a dense float64 mask."""

import pytest
import torch

from nnscaler_ring.core.plan.schedule import CAUSAL, FULL, Mask
from nnscaler_ring.simulator import GeneratedInputs, RingAttentionSimulator, SimulatedCall, Sizes
from nnscaler_ring.simulator.dilated_branch import DilatedBranch, longnet_branches

SIZES = Sizes(2, 1, 4, 4, "float64")


@pytest.mark.parametrize("mask", [CAUSAL, FULL], ids=str)
@pytest.mark.parametrize(
    ("tokens", "ranks", "segment", "dilation", "offset"),
    [(64, 4, 8, 1, 0), (64, 4, 32, 4, 1), (61, 3, 32, 8, 5), (40, 5, 64, 16, 3), (9, 4, 4, 2, 1)],
)
def test_equals_a_dense_mask(
    tokens: int, ranks: int, segment: int, dilation: int, offset: int, mask: Mask
) -> None:
    branch = DilatedBranch(tokens, ranks, segment, dilation, offset)
    call = SimulatedCall(tokens, ranks, SIZES, mask, branch)
    inputs = GeneratedInputs(SIZES)
    results = RingAttentionSimulator(call, inputs).all_ranks()
    every = torch.arange(tokens)
    q, k, v = (inputs.rows(name, every) for name in ("q", "k", "v"))
    takes_part = every % segment % dilation == offset
    sees = (every[:, None] // segment == every // segment) & takes_part & takes_part[:, None]
    if mask.right == 0:
        sees &= every <= every[:, None]
    scores = torch.einsum("bqhd,bkd->bhqk", q, k[:, :, 0]) / 2
    weights = scores.masked_fill(~sees, -torch.inf).softmax(-1).nan_to_num(0.0)
    expected = torch.einsum("bhqk,bkd->bqhd", weights, v[:, :, 0])
    torch.testing.assert_close(results.out, expected, rtol=0, atol=1e-12)


def test_branches_double_until_they_hold_everything() -> None:
    assert longnet_branches(10, 4) == [(4, 1), (8, 2), (16, 4)]


def test_dilation_must_divide_the_segment() -> None:
    with pytest.raises(ValueError, match="dilation must divide segment=8, got 3"):
        DilatedBranch(64, 4, 8, 3)
