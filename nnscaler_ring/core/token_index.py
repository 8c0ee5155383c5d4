"""Runs of tokens as one tensor: to take what a rank holds out of a whole tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def token_index(runs: Sequence[range], device: torch.device | str | None = None) -> Tensor:
    """The numbers of all runs, one after another: int64 [tokens].

    `whole[:, token_index(layout.positions(rank))]` is the shard of `rank`.
    """
    if len(runs) == 1:
        (run,) = runs
        return torch.arange(run.start, run.stop, run.step, device=device)
    # Row n of all rows is number n - (rows before its run) of the run.
    lengths = torch.tensor([len(run) for run in runs], dtype=torch.int64)
    steps = torch.tensor([run.step for run in runs], dtype=torch.int64)
    starts = torch.tensor([run.start for run in runs], dtype=torch.int64)
    firsts = starts - (lengths.cumsum(0) - lengths) * steps
    firsts, steps = firsts.repeat_interleave(lengths), steps.repeat_interleave(lengths)
    return (firsts + torch.arange(len(firsts)) * steps).to(device)
