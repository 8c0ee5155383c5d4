"""The same training on one device and on three ranks that share every sequence unevenly."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nnscaler_ring.tools.demo.memory import AttentionSize, attention_memory
from nnscaler_ring.tools.demo.model import ModelConfig
from nnscaler_ring.tools.demo.run import FLOAT64_LIMIT, differences
from nnscaler_ring.tools.demo.shard import OPS, Split, positions
from nnscaler_ring.tools.demo.text import Corpus, load_corpus
from nnscaler_ring.tools.demo.train import (
    RanksTraining,
    TrainConfig,
    Training,
    TrainResult,
    learning_rate,
    train,
)
from nnscaler_ring.tools.launch import Rank, run_ranks

TINY = TrainConfig(
    tokens=50,  # does not divide by 3 ranks, nor by 6 chunks
    steps=3,
    steps_float64=3,
    model=ModelConfig(width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, hidden=16),
)
CPU = torch.device("cpu")


def all_ops(rank: Rank, corpus: Corpus) -> tuple[dict[str, TrainResult], int]:
    results = {op: train(rank, RanksTraining, replace(TINY, op=op), corpus) for op in OPS}
    peak = attention_memory(rank, Split("ring", 4096, rank.group), AttentionSize())
    return results, peak.bytes


@pytest.fixture(scope="module")
def on_ranks():
    return run_ranks(3, all_ops, load_corpus())


def alone() -> Rank:
    return Rank(0, 1, CPU, lambda value: None, Path())


@pytest.mark.parametrize("op", OPS)
def test_ranks_train_as_one_device(on_ranks, op):
    one = train(alone(), Training, replace(TINY, op=op), load_corpus())
    for results, _ in on_ranks:
        many = results[op]
        assert max(differences(one.steps_float64, many.steps_float64)) < FLOAT64_LIMIT
        assert max(differences(one.steps, many.steps)) < 1e-6
        assert many.weights_spread == 0
        assert many.weights == one.weights
    assert one.steps[2].loss != one.steps[0].loss
    assert sum(results[op].steps[1].sent.total_bytes for results, _ in on_ranks) > 0
    assert one.steps[1].sent.total_bytes == 0


def test_varlen_sends_nothing_back_beyond_a_document(on_ranks):
    by_op = {
        op: sum(step.sent.total_bytes for results, _ in on_ranks for step in results[op].steps)
        for op in OPS
    }
    assert 0 < by_op["varlen"] < by_op["ring"]


@pytest.mark.parametrize("in_zigzag_order", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_every_token_is_on_one_rank(op, in_zigzag_order):
    split = Split(op, 50, [0, 1, 2], in_zigzag_order)
    rows = [row for rank in range(3) for row in split.rows(rank)[0].tolist()]
    assert sorted(rows) == list(range(50))
    assert (rows == sorted(rows)) == (op != "zigzag" or not in_zigzag_order)


@pytest.mark.parametrize("op", OPS)
def test_one_device_holds_the_sequence_in_order(op):
    """Whatever its rank: under nnScaler every rank is given the whole sequence."""
    for rank in range(3):
        assert Split(op, 50).rows(rank).tolist() == [list(range(50))]


@pytest.mark.parametrize("op", OPS)
def test_positions_start_again_only_in_packed_documents(op):
    expected = [*range(20), *range(30)] if op == "varlen" else [*range(50)]
    rows, cu_seqlens = Split(op, 50).rows(0), torch.tensor([0, 20, 20, 50])
    assert positions(op, rows, cu_seqlens).tolist() == [expected]


def test_ranks_have_attention_for_what_they_hold():
    options = Split("zigzag", 50, [0, 1, 2]).attention("auto").options
    assert options["shard_lens"] == (17, 16, 17) and options["layout"] == "zigzag"
    options = Split("zigzag", 50, [0, 1, 2], in_zigzag_order=False).attention("auto").options
    assert options["shard_lens"] == (16, 17, 17) and "layout" not in options
    assert Split("zigzag", 50).attention("auto").options == {"kernel": "auto"}


def test_attention_memory_counts_the_tensors(on_ranks):
    # q, out, dout, dq of 4 heads and k, v, dk, dv of 2, 64 channels in float32.
    tensors = 4096 // 3 * 64 * 4 * (4 * 4 + 4 * 2)
    for _, peak in on_ranks:
        assert tensors * 0.9 < peak < tensors * 3


def test_learning_rate_rises_then_falls():
    config = TrainConfig(steps=40, warmup_steps=8, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in range(40)]
    assert rates[:8] == pytest.approx([n / 8 for n in range(1, 9)])
    assert rates[8:] == sorted(rates[8:], reverse=True)
    assert rates[8] == pytest.approx(1.0)
    assert 0.1 <= rates[-1] < 0.11
