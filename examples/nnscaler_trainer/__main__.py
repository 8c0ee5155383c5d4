"""nnScaler's `train` command, on GPUs or, where there are none, on CPU ranks.

    torchrun --nproc-per-node 2 -m examples.nnscaler_trainer -f examples/nnscaler_trainer/train.yaml

On GPUs `torchrun ... -m nnscaler.cli.train -f ...` is the same.
"""

from __future__ import annotations

import contextlib

import torch

from nnscaler_ring.cpu_runtime import nnscaler_on_cpu


def main() -> None:
    with contextlib.nullcontext() if torch.cuda.is_available() else nnscaler_on_cpu():
        from nnscaler.cli import train

        train.main()


if __name__ == "__main__":
    main()
