"""The example, run as a user runs it: the model lives in `__main__`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from tests.ranks import rank_environment

EXAMPLE = Path(__file__).parents[2] / "examples" / "nnscaler_train.py"


def test_example() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    with rank_environment():
        done = subprocess.run(
            [*torchrun, *rendezvous, str(EXAMPLE), "--steps", "6", "--tokens", "64"],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "PYTHONPATH": str(EXAMPLE.parents[1])},
        )
    assert done.returncode == 0, done.stderr
    assert f"{2} ranks, 32 of 64 tokens each" in done.stdout
    losses = [float(x) for x in re.findall(r": ([\d.]+) nats", done.stdout)]
    assert losses[-1] < losses[0]
    (worst,) = re.findall(r"largest difference to one device: (\S+)", done.stdout)
    assert float(worst) < (1e-5 if not torch.cuda.is_available() else 1e-2)
