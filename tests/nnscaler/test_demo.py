"""The demonstration under nnScaler: the same training as on one device, really shared."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from nnscaler_ring.tools.commands import commands
from nnscaler_ring.tools.commands import demo as demo_command
from nnscaler_ring.tools.demo.model import ModelConfig
from nnscaler_ring.tools.demo.nnscaler_train import NnScalerTraining
from nnscaler_ring.tools.demo.run import FLOAT64_LIMIT, DemoConfig, differences
from nnscaler_ring.tools.demo.shard import OPS
from nnscaler_ring.tools.demo.text import Corpus, load_corpus
from nnscaler_ring.tools.demo.train import TrainConfig, Training, TrainResult, train
from nnscaler_ring.tools.launch import Rank, run_ranks

TINY = TrainConfig(
    tokens=42,  # 21 on each rank: zigzag chunks of 10 and 11
    steps=3,
    steps_float64=3,
    model=ModelConfig(width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, hidden=24),
)


def all_ops(rank: Rank, corpus: Corpus) -> dict[str, tuple[TrainResult, list[str]]]:
    """Each training, and the code that nnScaler generated for this rank."""
    found = {}
    for op in OPS:
        result = train(rank, NnScalerTraining, replace(TINY, op=op), corpus)
        files = rank.folder.rglob(f"{op}_*/gencode{rank.rank}.py")
        found[op] = result, [file.read_text() for file in files]
    return found


@pytest.fixture(scope="module")
def on_ranks() -> list[dict[str, tuple[TrainResult, list[str]]]]:
    return run_ranks(2, all_ops, load_corpus())


@pytest.mark.parametrize("op", OPS)
def test_trains_like_one_device(
    on_ranks: list[dict[str, tuple[TrainResult, list[str]]]], op: str
) -> None:
    alone = Rank(0, 1, torch.device("cpu"), lambda value: None, Path())
    one = train(alone, Training, replace(TINY, op=op), load_corpus())
    results = [found[op] for found in on_ranks]
    for many, codes in results:
        assert max(differences(one.steps_float64, many.steps_float64)) < FLOAT64_LIMIT
        assert max(differences(one.steps, many.steps)) < 1e-6
        assert (many.weights, many.weights_spread) == (one.weights, 0)
        assert many.steps[0].loss != many.steps[2].loss
        assert len(codes) == 2  # float32 and float64
        for code in codes:
            groups = re.findall(r"wrap_\w+\(.*process_group=(.*)\)$", code, re.MULTILINE)
            assert groups == ["(0, 1)"] * TINY.model.num_layers
            assert "gather" not in code.split("def segment")[1].split("def reducer")[0]
    # Causal: the second rank reads the first one's keys, so attention had to move something.
    assert sum(many.steps[1].sent.total_bytes for many, _ in results) > 0


@pytest.mark.full
def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo_command, "DemoConfig", partial(DemoConfig, memory_ranks=(1,)))
    args = ("--steps", "2", "--tokens", "48", "--memory-tokens", "64", "--out", str(tmp_path))
    done = CliRunner().invoke(commands, ["demo", "--engine", "nnscaler", *args])
    assert done.exit_code == 0, done.output
    assert "2 ranks under nnScaler did the same training" in " ".join(done.output.split())
    data = json.loads((tmp_path / "demo.json").read_text())
    assert data["config"]["engine"] == "nnscaler"
    assert data["equal"] is True
    assert data["versions"]["nnscaler"]
    assert (tmp_path / "losses_and_memory.png").read_bytes().startswith(b"\x89PNG")
