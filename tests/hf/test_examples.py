"""The examples run as their first lines say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs transformers: the hf extra")
pytest.importorskip("trl", reason="needs trl, accelerate and datasets: the dev extra")

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--tokens", "256", "--save-every", "2", "--new-tokens", "4")


def run(folder: Path, ranks: int, name: str, *arguments: str) -> str:
    """What an example prints; fails with all of it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", str(ranks), str(ROOT / "examples" / name), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.full
def test_finetune_goes_on_with_another_number_of_ranks(tmp_path):
    first = run(tmp_path, 2, "hf_finetune.py", "--steps", "2", *SMALL)
    assert "step 1: loss" in first and "step 2: loss" in first
    assert "after 128 tokens:" in first
    on_three = run(tmp_path, 3, "hf_finetune.py", "--steps", "3", "--out", "hf_finetune", *SMALL)
    assert "step 2" not in on_three and "step 3: loss" in on_three
    alone = run(tmp_path, 1, "hf_finetune.py", "--steps", "3", "--out", "alone", *SMALL)
    steps = [line.split(",")[0] for line in alone.splitlines() if line.startswith("step")]
    assert steps == [
        line.split(",")[0] for line in (first + on_three).splitlines() if line.startswith("step")
    ]


@pytest.mark.full
@pytest.mark.parametrize("name", ["hf_trainer.py", "hf_trl.py"])
def test_trainers(tmp_path, name):
    assert "'train_loss'" in run(tmp_path, 2, name)
    assert len((ROOT / "examples" / name).read_text().splitlines()) < 40
