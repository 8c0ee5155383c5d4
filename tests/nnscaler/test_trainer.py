"""nnScaler's own Trainer on CPU ranks, with our policies by name, trains like one device."""

import os
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch.utils.data import DataLoader

from examples.nnscaler_trainer.model import LanguageModel, Pages
from tests.nnscaler.runtime import generated_code, nnscaler_ranks
from tests.ranks import RankPool, rank_environment

EXAMPLE = Path(__file__).parents[2] / "examples" / "nnscaler_trainer"
TOKENS, ROWS, ACCUMULATION, STEPS = 32, 2, 2, 4
SIZES = {"tokens": TOKENS, "micro_batch_size": ROWS, "width": 16}
TEXT = {"tokens": TOKENS, "files": ["heapq.py"]}
MAX_NORM = 0.5
# eps above rounding: Adam turns a gradient that is rounding alone into whole steps, and what is
# left of one differs from processor to processor.
ADAMW = {"lr": 0.003, "eps": 1e-4}

CHANGES: dict[str, dict[str, Any]] = {
    "as the example": {},
    "ZeRO-1": {"compute_config": {"use_zero": 1}},
    "ZeRO-3": {"compute_config": {"use_zero": 3, "reducer_replicated_params": True}},
    "async reducer": {"compute_config": {"use_async_reducer": True}},
    "bf16": {"precision": "bf16"},
    "autodist": {
        "pas_policy": "nnscaler_ring.policies.autodist_by_sequence",
        "compute_config": {"pas_config": {"mem_constraint": 4}},
    },
}


def settings(folder: Path, name: str, steps: int, resume: str | None = None) -> dict[str, Any]:
    """The example's train.yaml with smaller sizes and this change."""
    text = (EXAMPLE / "train.yaml").read_text().replace("$(WORLD_SIZE)", os.environ["WORLD_SIZE"])
    found: dict[str, Any] = yaml.safe_load(text)
    found["model"]["args"] = SIZES
    found["dataset"] |= {"train_args": TEXT, "val_args": {**TEXT, "pieces": ROWS}}
    found["dataset_sampler"] = {"train_args": {"shuffle": False}}
    found["optimizer"] |= {"args": ADAMW, "clip_gnorm": MAX_NORM}
    found["checkpoint"] = {
        "save_dir": str(folder / "checkpoints"),
        "every_n_train_steps": 2,
        "resume_from": resume,
        "keep_last_n_checkpoints": 2,
    }
    found |= {"gen_savedir": str(folder / "code"), "max_train_steps": steps}
    found |= {"micro_batch_size": ROWS, "grad_accumulation_steps": ACCUMULATION}
    found |= {"val_every_n_train_steps": 2, "log_progress_every_n_train_steps": 100}
    for key, value in deepcopy(CHANGES[name]).items():
        found[key] = {**found[key], **value} if isinstance(value, dict) else value
    pas_config = found["compute_config"].get("pas_config")
    # One process trains many times here, and may not generate again what it has loaded.
    found["instance_name"] = "_" + re.sub(r"\W", "_", f"{folder.name} {name}")
    if resume:
        found["gen_reuse"] = "match"
    if pas_config:
        pas_config["profile_dir"] = str(folder / "times")
    return found


def train(ranks: list[int], folder: Path, name: str, resume: bool) -> tuple[dict[str, Any], str]:
    """Merged weights of the last checkpoint, and this rank's generated code."""
    with nnscaler_ranks():
        from nnscaler.cli.trainer import Trainer

        if resume:
            Trainer(train_args=settings(folder, name, 2)).run()
            dist.barrier()
        Trainer(train_args=settings(folder, name, STEPS, "last" if resume else None)).run()
        dist.barrier()
        files = sorted((folder / "checkpoints" / "last").glob("*.ckpt"))
        assert len(files) == len(ranks)
        if dist.get_rank() == 0:
            Trainer.merge_checkpoint([str(file) for file in files], str(folder / "merged.pt"))
        dist.barrier()
        merged = torch.load(folder / "merged.pt", weights_only=False)
        return merged["model"], generated_code(folder / "code")


def one_device(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The same training in a plain loop."""
    torch.manual_seed(0)
    text = Pages(**TEXT)
    next(iter(DataLoader(text)))  # nnScaler looks at a sample first, which takes a random number
    model = LanguageModel(**SIZES).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    pieces = iter(text[index] for index in range(len(text)))
    for _ in range(STEPS):
        for _ in range(ACCUMULATION):
            rows = [next(pieces) for _ in range(ROWS)]
            model({key: torch.stack([row[key] for row in rows]) for key in rows[0]}).backward()
        for weight in model.parameters():
            weight.grad /= ACCUMULATION
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def check(pool: RankPool, folder: Path, name: str, resume: bool = False) -> None:
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    expected = one_device(dtype)
    results = pool.run(pool.size, train, folder, name, resume, timeout=150)
    for weights, code in results:
        groups = re.findall(r"process_group=(\(.*?\))", code)
        assert groups == ["(0, 1)"] * 2
        assert set(weights) == set(expected)
        for key, x in weights.items():
            if name == "bf16":  # Adam makes whole steps, of either sign, of what bf16 rounds away
                assert (x - expected[key]).abs().mean() < ADAMW["lr"] / 2, key
                continue
            torch.testing.assert_close(x, expected[key], rtol=0, atol=2e-5, msg=key)


QUICK = ("ZeRO-1",)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.full) for n in CHANGES]
)
def test_trains_like_one_device(two_ranks: RankPool, tmp_path: Path, name: str) -> None:
    """Accumulation, clipping, validation between steps, checkpoints and their merge."""
    check(two_ranks, tmp_path, name, resume=name == "ZeRO-1")


def test_the_command(tmp_path: Path) -> None:
    """As its first lines say, but shorter: it learns, and its checkpoint is resumed."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command = [*torchrun, "-m", "examples.nnscaler_trainer", "-f", str(EXAMPLE / "train.yaml")]
    command += ["--max_train_steps", "6", "--val_every_n_train_steps", "3"]
    command += ["--log_progress_every_n_train_steps", "1", "--checkpoint.every_n_train_steps", "3"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE.parents[1])}
    with rank_environment():
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=200, cwd=tmp_path, env=environment
        )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(x) for x in re.findall(r"train_loss=([\d.]+), lr", done.stderr + done.stdout)]
    assert losses[-1] < losses[0] - 0.3
    folder = tmp_path / "nnscaler_trainer"
    assert len(list((folder / "checkpoints" / "last").glob("*.ckpt"))) == 2
    code = generated_code(folder / "code", 0)
    assert re.findall(r"process_group=(\(.*?\))", code) == ["(0, 1)"] * 2
    assert "gather" not in code.split("def reducer")[0].split("def segment")[1]


@pytest.mark.full
@pytest.mark.parametrize("name", ["as the example", "ZeRO-3", "bf16"])
def test_resumes(two_ranks: RankPool, tmp_path: Path, name: str) -> None:
    check(two_ranks, tmp_path, name, resume=True)
