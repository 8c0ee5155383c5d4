"""RingAttentionTester: it runs over ranks, and it sees what is wrong."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nnscaler_ring.dilated import RingAttentionTester
from nnscaler_ring.tools.launch import Rank
from nnscaler_ring.tools.ring_attention_tester import (
    MEMORY_TOKENS,
    MODELS,
    _definition,
    _difference,
    main,
)
from tests.dilated_oracle import dilated_attention
from tests.oracle import make_qkv
from tests.tolerances import assert_close_float64

NAMES = {
    *(model.name for model in MODELS),
    *(f"{model.name} Multihead" for model in MODELS),
    *(f"seq_len_{tokens}" for tokens in MEMORY_TOKENS),
}


@pytest.mark.parametrize("causal", [True, False])
def test_its_definition_is_the_oracle(causal):
    model = MODELS[0]
    q, k, v = make_qkv(0, 1, model.tokens, model.tokens, 4, 4, 16)
    expected, _ = dilated_attention(
        q, k, v, model.segment_lengths, model.dilation_rates, causal=causal
    )
    assert_close_float64(_definition(model, q, k, v, causal=causal), expected, "out")


@pytest.mark.full
def test_command_line(capsys):
    """Two ranks in float64: everything passes at 1e-10."""
    assert main(["--dtype", "float64", "--verbose"]) == 0
    said = capsys.readouterr().out
    assert "All Ring Attention tests passed over 2 ranks." in said
    assert said.count("Equivalent: True") == 4 and "(tolerance: 1.00e-10)" in said


def small_model(ranks):
    """What a rank of the tester finds, on a rank of the pool."""
    rank = Rank(dist.get_rank(), len(ranks), torch.device("cpu"), print, Path())
    return _difference(rank, MODELS[0], torch.float64, True)


def test_ring_path_on_ranks(pool):
    differences = pool.run(2, small_model)
    assert 0 < max(differences) < 1e-10


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_over_three_ranks(dtype):
    results = RingAttentionTester("cpu", dtype, ranks=3).run_all_tests()
    assert set(results) == NAMES
    assert all(result.passed for result in results.values())
    assert results["Small Model"].max_difference > 0


@pytest.mark.full
def test_too_small_a_tolerance_fails(capsys):
    assert main(["--tolerance", "1e-12", "--verbose"]) == 1
    assert "FAILED: Small Model, Medium Model" in capsys.readouterr().out


def test_bad_arguments(capsys):
    with pytest.raises(ValueError, match="dtype must be one of"):
        RingAttentionTester(dtype=torch.int8)
    with pytest.raises(ValueError, match="tolerance must be above 0"):
        RingAttentionTester(tolerance=0)
    with pytest.raises(SystemExit):
        main(["--ranks", "0"])
    assert "ranks must be at least 1" in capsys.readouterr().err
