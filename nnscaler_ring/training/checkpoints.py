"""Checkpoints of a training run, and its resumption after torchrun has restarted the ranks."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

KEPT = 2
"""Whole checkpoints that stay on disk; older ones are removed."""


class TrainingCheckpoints:
    """Saves model, optimizer and random states every `interval` steps; each rank its shards.

    A checkpoint is written under a name of its own and renamed when all ranks are done, so that a
    run that ends in between never finds half of one. A run that is resumed continues bit for bit,
    on as many ranks as wrote it.

    Args:
        folder: on a disk that all ranks see.
        model: its state is taken through torch.distributed.checkpoint: FSDP2 and tensor
            parallelism included.
        interval: steps from one checkpoint to the next.
        auto_resume: whether `resume` loads the latest checkpoint; else it starts from step 0.
    """

    def __init__(
        self,
        folder: str | Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        interval: int = 1000,
        auto_resume: bool = True,
    ) -> None:
        if interval < 1:
            raise ValueError(f"interval must be at least 1 step, got {interval}.")
        self.folder = Path(folder)
        self.model, self.optimizer = model, optimizer
        self.interval, self.auto_resume = interval, auto_resume

    def resume(self) -> int:
        """Load the latest whole checkpoint; the number of steps done, 0 where there is none.

        Raises:
            ValueError: it was written by another number of ranks.
        """
        done = self.steps_saved()
        if not self.auto_resume or not done:
            return 0
        self.load(done[-1])
        return done[-1]

    def steps_saved(self) -> list[int]:
        """The steps after which there is a whole checkpoint, ascending; rank 0 looks."""
        steps = [self._find()]
        if dist.is_initialized():
            dist.broadcast_object_list(steps, src=0)
        return steps[0]

    def after_step(self, step: int) -> None:
        """Save if `step` steps are a multiple of the interval. Called by all ranks."""
        if step % self.interval == 0:
            self.save(step)

    def save(self, step: int) -> None:
        """Write a checkpoint after so many steps. Called by all ranks."""
        import torch.distributed.checkpoint as dcp

        target, unfinished = self._path(step), self.folder / f"unfinished-{step}"
        if _rank() == 0:
            for path in (target, unfinished):
                shutil.rmtree(path, ignore_errors=True)
            unfinished.mkdir(parents=True)
        _barrier()
        dcp.save(self._state(), checkpoint_id=unfinished, no_dist=not dist.is_initialized())
        torch.save(_random_states(), unfinished / f"random-{_rank()}-of-{_world_size()}.pt")
        _barrier()
        if _rank() == 0:
            unfinished.rename(target)
            for old in self._find()[:-KEPT]:
                shutil.rmtree(self._path(old))
        _barrier()

    def load(self, step: int) -> None:
        """Load the checkpoint after so many steps. Called by all ranks."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_state_dict

        random_states = self._path(step) / f"random-{_rank()}-of-{_world_size()}.pt"
        if not random_states.exists():
            raise ValueError(
                f"folder {self.folder} holds a checkpoint of another number of ranks than "
                f"{_world_size()}, and random states belong to ranks; restart with as many."
            )
        state = self._state()
        dcp.load(state, checkpoint_id=self._path(step), no_dist=not dist.is_initialized())
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        _set_random_states(torch.load(random_states, weights_only=False))

    def _state(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def _find(self) -> list[int]:
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)


def _random_states() -> dict[str, Any]:
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
