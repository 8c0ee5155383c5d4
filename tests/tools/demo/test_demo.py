"""The demonstration as a whole: its figure, its numbers and its sentence."""

import importlib.util
import json
import math
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from click.testing import CliRunner

from nnscaler_ring.core.ranks.groups import Traffic
from nnscaler_ring.tools.commands import commands
from nnscaler_ring.tools.commands import demo as demo_command
from nnscaler_ring.tools.demo.memory import PeakMemory
from nnscaler_ring.tools.demo.nnscaler_train import NnScalerTraining
from nnscaler_ring.tools.demo.report import sentence, summary
from nnscaler_ring.tools.demo.run import DemoConfig, DemoResult, run_demo
from nnscaler_ring.tools.demo.text import Corpus
from nnscaler_ring.tools.demo.train import RanksTraining, Step, TrainResult


def steps(*losses: float) -> list[Step]:
    return [Step(n, loss, 0.1 * (n + 1), Traffic()) for n, loss in enumerate(losses)]


ALONE = TrainResult(
    steps=steps(5.5, 4.0),
    steps_float64=steps(5.5, 4.0),
    peak_bytes=2**20,
    memory_method="",
    weights=3,
    weights_spread=0.0,
    kernels={},
)
RANKS = replace(ALONE, steps=steps(5.5, 4.0 + 4e-6), steps_float64=steps(5.5, 4.0 - 8e-15))
RESULT = DemoResult(
    corpus=Corpus("here", (b"ab",)),
    alone=ALONE,
    ranks=[RANKS, RANKS],
    memory={
        1: [PeakMemory(8 * 2**20, "")],
        2: [PeakMemory(4 * 2**20, ""), PeakMemory(5 * 2**20, "")],
    },
    seconds=1.0,
)


def run(*args: str):
    return CliRunner().invoke(commands, ["demo", *args])


def test_sentence_holds_the_measured_numbers():
    text = sentence(DemoConfig(), RESULT)
    assert text == (
        "2 steps on real text took the loss from 5.50 to 4.75 (mean of the last 2), and 2 ranks "
        "did the same training as one device: the losses differ by at most 1.0e-06 of their value "
        "in float32 and 2.0e-15 of their value in float64; attention to 16384 tokens took at most "
        "8 MiB on one rank, 5 MiB on each of 2."
    )


@pytest.mark.parametrize("loss", [4.0 + 1e-11, math.nan])
def test_other_losses_are_not_called_the_same(monkeypatch, tmp_path, loss):
    wrong = replace(RESULT, ranks=[replace(RANKS, steps_float64=steps(5.5, loss))] * 2)
    assert "NOT the same training" in sentence(DemoConfig(), wrong)
    monkeypatch.setattr(demo_command, "run_demo", lambda *args: wrong)
    done = run("--out", str(tmp_path))
    assert done.exit_code == 1
    assert "NOT the same" in " ".join(done.output.split())


def test_missing_matplotlib_is_one_line(monkeypatch):
    monkeypatch.setattr(demo_command.importlib.util, "find_spec", lambda name: None)
    done = run()
    assert done.exit_code == 2
    assert "pip install 'nnscaler_ring[demo]'" in done.output


def test_demo_writes_a_figure_and_numbers(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_command, "DemoConfig", partial(DemoConfig, memory_ranks=(1,)))
    monkeypatch.setattr(demo_command, "run_demo", run_demo)
    out = tmp_path / "new" / "demo"
    args = ("--steps", "2", "--tokens", "48", "--memory-tokens", "64", "--out", str(out))
    done = run(*args, "--op", "varlen", "--seed", "3")
    assert done.exit_code == 0, done.output
    assert (out / "losses_and_memory.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((out / "demo.json").read_text())
    assert data["sentence"] in " ".join(done.output.split())
    assert data["equal"] is True
    assert data["config"]["train"]["op"] == "varlen"
    assert data["config"]["train"]["seed"] == 3
    assert len(data["steps"]) == 2
    assert data["steps"][0]["loss_one_device"] == pytest.approx(math.log(256), rel=0.1)
    assert len(data["attention_bytes_sent_per_step"]) == 2
    assert data["versions"]["torch"]
    assert "examples/energy_forecasting" in done.output
    for stage in ("one device", "2 ranks", "memory of attention, N = 1"):
        assert stage in done.output


def no_nnscaler(name):
    return None if name == "nnscaler" else find_spec(name)


@pytest.mark.parametrize(
    ("args", "has_nnscaler", "has_cuda", "message"),
    [
        ((), False, False, "needs nnScaler, which is not installed and not on PyPI: pip install"),
        (("--ranks", "3"), True, False, "got 2048 tokens and 3 ranks: its shards are all equal; "),
        (("--ranks", "3", "--tokens", "100"), True, False, "use 99 tokens, or engine torch"),
        ((), True, True, "device must be cuda with engine nnscaler where CUDA is available"),
    ],
)
def test_what_nnscaler_cannot_show_is_refused(
    monkeypatch, tmp_path, args, has_nnscaler, has_cuda, message
):
    monkeypatch.setattr(
        importlib.util, "find_spec", (lambda name: True) if has_nnscaler else no_nnscaler
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    done = run("--engine", "nnscaler", "--out", str(tmp_path / "demo"), *args)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
    assert not (tmp_path / "demo").exists()


def test_other_lengths_are_refused_by_nnscaler_alone(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    RanksTraining.check(3, "cpu", 2048)
    with pytest.raises(ValueError, match="use 3 tokens, or engine torch"):
        NnScalerTraining.check(3, "cpu", 2)


def test_the_engine_is_named():
    assert DemoConfig(ranks=3).ranks_name == "3 ranks"
    assert DemoConfig(ranks=1).ranks_name == "1 rank"
    nnscaler = DemoConfig("nnscaler")
    assert "and 2 ranks under nnScaler did the same training" in sentence(nnscaler, RESULT)
    assert summary(nnscaler, RESULT, "")["config"]["engine"] == "nnscaler"
