"""Checkpoints: a resumed run continues bit for bit, also after torchrun restarted its ranks."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from nnscaler_ring.dilated import TrainingCheckpoints
from tests.ranks import rank_environment

ROOT = Path(__file__).parents[2]


def begin(folder, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    checkpoints = TrainingCheckpoints(folder, model, optimizer, interval=2, **options)
    return model, optimizer, checkpoints


def train(folder, steps, **options):
    """Losses by step, from where the run is resumed."""
    model, optimizer, checkpoints = begin(folder, **options)
    losses = {}
    for step in range(checkpoints.resume() + 1, steps + 1):
        loss = model(torch.randn(5, 4)).square().mean() * random.random()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses[step] = loss.item()
        checkpoints.after_step(step)
    return losses


def test_resumed_run_is_the_same(tmp_path):
    random.seed(0)
    whole = train(tmp_path / "whole", 8)
    random.seed(0)
    first = train(tmp_path / "parts", 5)
    random.seed(9)
    rest = train(tmp_path / "parts", 8)
    assert list(rest) == [5, 6, 7, 8]  # from the checkpoint after step 4
    assert first[5] == rest[5]
    assert {**first, **rest} == whole


def test_only_whole_checkpoints_are_resumed_and_old_ones_go(tmp_path):
    train(tmp_path, 7)
    (tmp_path / "unfinished-8").mkdir()
    _, _, checkpoints = begin(tmp_path)
    assert checkpoints.steps_saved() == [4, 6]
    assert checkpoints.resume() == 6
    assert begin(tmp_path, auto_resume=False)[2].resume() == 0
    assert begin(tmp_path / "none")[2].resume() == 0
    (tmp_path / "step-6" / "random-0-of-1.pt").unlink()
    with pytest.raises(ValueError, match="holds a checkpoint of another number of ranks than 1"):
        checkpoints.resume()
    with pytest.raises(ValueError, match="interval must be at least 1 step"):
        TrainingCheckpoints(tmp_path, nn.Linear(1, 1), None, interval=0)


def run_example(folder, *arguments):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with rank_environment():
        done = subprocess.run(
            [
                sys.executable,
                *torchrun,
                "--max-restarts",
                "1",
                str(ROOT / "examples" / "dilated_training.py"),
                *("--folder", str(folder), "--steps", "10", "--checkpoint-interval", "4"),
                *arguments,
            ],
            capture_output=True,
            text=True,
            timeout=240,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # as the example says
            },
        )
    assert done.returncode == 0, done.stderr
    lines = (folder / "losses.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


@pytest.mark.full
def test_a_rank_dies_and_torchrun_restarts(tmp_path):
    """The loss curve continues bit for bit."""
    whole = run_example(tmp_path / "whole")
    assert [step for step, _ in whole] == list(range(1, 11))
    assert whole[-1][1] < whole[0][1]
    broken = run_example(tmp_path / "broken", "--fail-at", "7")
    assert (tmp_path / "broken" / "failed").exists()
    # Rank 1 died after step 7; steps 5 to 7 are done again from the checkpoint after step 4.
    assert [step for step, _ in broken] == [*range(1, 8), *range(5, 11)]
    assert set(broken) == set(whole)
