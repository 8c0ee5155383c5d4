"""Checkpoints of a training run that can be trusted, and its resumption on any number of ranks.

Note [A checkpoint on disk]
    A folder `step-N` with a file of tensors and a file of states from each rank that wrote it
    (`rank-R-of-W.safetensors`, `rank-R-of-W.json`), an index of them (`checkpoint.json`), and
    `SHA256SUMS`, which `sha256sum --check` reads. No file is a pickle: what is read can hold wrong
    numbers, and cannot run anything. The folder is written under another name, forced to the disk,
    and renamed when all ranks are done; one that it replaces is renamed first and removed last. So
    at any time there is at least one whole checkpoint, if there ever was one.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnscaler_ring.training.checkpoint_state import check_state, put_state, take_state
from nnscaler_ring.training.checkpoint_tensors import Held, SavedTensors, plan_writing
from nnscaler_ring.training.plain_states import decode, encode
from nnscaler_ring.training.random_states import random_states, seed_apart, set_random_states
from nnscaler_ring.training.tensor_files import (
    file_digest,
    folder_to_disk,
    write_tensors,
    write_text,
)
from nnscaler_ring.training.verdict import gather, rank_and_size, together

logger = logging.getLogger(__name__)

KEPT = 2
"""Whole checkpoints that stay on disk; older ones are removed."""

FORMAT = 1
SUMS, INDEX = "SHA256SUMS", "checkpoint.json"


class TrainingCheckpoints:
    """Saves a training run every `interval` steps, each rank its part, and resumes it.

    Saved are the model, the optimizer, the states that are given by name, and the random states of
    torch, CUDA, Python and numpy. A run that is resumed on as many ranks continues bit for bit; on
    another number of ranks, within the rounding of sums, as long as what its random states and
    `states` hold is the same on every rank. Any model will do: FSDP2 and tensor parallelism are
    saved in the parts that ranks hold, everything else once. See Note [A checkpoint on disk].

    Args:
        folder: on a disk that all ranks see.
        model: on every rank of the default group.
        optimizer: of the model's parameters.
        interval: steps from one checkpoint to the next.
        auto_resume: whether `resume` loads the latest checkpoint; else it starts from step 0.
        states: further objects by name, such as schedulers, data loaders and gradient scalers, that
            have `state_dict` and `load_state_dict`; or a `torch.Generator`, or numpy's. Their
            states must be made of numbers, strings, lists, tuples, dictionaries, arrays, tensors.

    Raises:
        ValueError, TypeError: an argument that cannot be honoured, by name.
    """

    def __init__(
        self,
        folder: str | Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        interval: int = 1000,
        auto_resume: bool = True,
        states: Mapping[str, Any] | None = None,
    ) -> None:
        if interval < 1:
            raise ValueError(f"interval must be at least 1 step, got {interval}.")
        self.folder = Path(folder)
        self.model, self.optimizer = model, optimizer
        self.interval, self.auto_resume = interval, auto_resume
        self.states = dict(states or {})
        for name, value in self.states.items():
            _reader_and_writer(name, value)

    def resume(self) -> int:
        """Load the latest whole checkpoint; the number of steps done, 0 where there is none.

        A checkpoint that is damaged is passed over with a warning, for the whole one before it.

        Raises:
            ValueError: on every rank: all checkpoints are damaged; or the latest whole one is of
                another model or optimizer, or of another number of ranks whose `states` differ.
        """
        found = self._found()
        if not self.auto_resume or not found:
            return 0
        damages: list[str] = []
        for step, path in sorted(found.items(), reverse=True):
            damage = _damage(path)
            if damage is None:
                for text in damages:
                    warnings.warn(f"{text}; resumed from step {step} instead.", stacklevel=2)
                self._load(path)
                return step
            damages.append(f"checkpoint {path} is damaged: {damage}")
        raise ValueError(
            f"folder {self.folder} must have a whole checkpoint to resume from; "
            f"{'; '.join(damages)}. Bring one back, or move these away to start from step 0."
        )

    def steps_saved(self) -> list[int]:
        """The steps after which there is a checkpoint, ascending; rank 0 looks."""
        return sorted(self._found())

    def after_step(self, step: int) -> None:
        """Save if `step` steps are a multiple of the interval. Called by all ranks."""
        if step % self.interval == 0:
            self.save(step)

    def save(self, step: int) -> None:
        """Write a checkpoint after so many steps. Called by all ranks.

        Raises:
            RuntimeError, OSError, TypeError: on every rank, if one of them could not write its
                part; earlier checkpoints are as they were.
        """
        rank, size = rank_and_size()
        unfinished = self.folder / f"unfinished-{step}"
        what = f"saving the checkpoint after step {step}"

        def begin() -> None:
            if rank == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)

        def finish() -> None:
            if rank == 0:
                _write_index(unfinished, step, size, index, plain, sums)
                self._publish(unfinished, step)

        together(what, begin)
        try:
            tensors, plain, held = together(what, self._take)
            writes, index = together(what, lambda: _plan(held))
            mine = {name: tensors[name] for name in writes}
            written = together(what, lambda: self._write(unfinished, mine))
            sums = [pair for pairs in gather(written) for pair in pairs]
            together(what, finish)
        except Exception:
            if rank == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def load(self, step: int) -> None:
        """Load the checkpoint after so many steps. Called by all ranks.

        Raises:
            ValueError: on every rank: there is none, it is damaged, or it does not fit.
        """
        path = self._found().get(step, self.folder / f"step-{step}")
        damage = _damage(path)
        if damage is not None:
            raise ValueError(f"checkpoint {path} is damaged: {damage}.")
        self._load(path)

    def _take(self) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]:
        tensors, plain = take_state(self.model, self.optimizer)
        parts = {name: Held.of(x, name) for name, x in tensors.items()}
        held = {name: part.describe() for name, part in parts.items()}
        return {name: part.local for name, part in parts.items()}, plain, held

    def _write(self, folder: Path, tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, str]]:
        """Write this rank's two files; returns their names and digests."""
        rank, size = rank_and_size()
        stem = f"rank-{rank}-of-{size}"
        states = {
            "random": encode(random_states(), "the random states"),
            "states": {
                name: encode(_reader_and_writer(name, value)[0](), f"the state {name!r}")
                for name, value in self.states.items()
            },
        }
        return [
            (f"{stem}.safetensors", write_tensors(folder / f"{stem}.safetensors", tensors)),
            (f"{stem}.json", write_text(folder / f"{stem}.json", json.dumps(states))),
        ]

    def _publish(self, unfinished: Path, step: int) -> None:
        """Give a whole checkpoint its name, and remove what it makes superfluous. On rank 0."""
        target, replaced = self.folder / f"step-{step}", self.folder / f"replaced-{step}"
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        unfinished.rename(target)
        folder_to_disk(self.folder)
        found = self._find()
        for later in [other for other in found if other > step]:
            aside = self.folder / f"abandoned-{later}"
            shutil.rmtree(aside, ignore_errors=True)
            found.pop(later).rename(aside)
            logger.warning(
                "checkpoint after step %d is of a run that went on from an earlier step; it is "
                "now %s",
                later,
                aside,
            )
        for old in sorted(found)[:-KEPT]:
            shutil.rmtree(found[old])
        shutil.rmtree(replaced, ignore_errors=True)

    def _load(self, path: Path) -> None:
        """Load a checkpoint that is not damaged; nothing is changed unless all ranks can."""
        what = f"loading checkpoint {path}"
        rank, size = rank_and_size()

        def read() -> tuple[dict[str, Any], SavedTensors, list[dict[str, Any]]]:
            content = json.loads((path / INDEX).read_text())
            stems = [f"rank-{n}-of-{content['ranks']}" for n in range(content["ranks"])]
            files = [path / f"{stem}.safetensors" for stem in stems]
            saved = SavedTensors(content["tensors"], files, rank)
            check_state(content["plain"], saved, self.model, self.optimizer)
            wanted = [stems[rank]] if size == len(stems) else stems
            states = [json.loads((path / f"{stem}.json").read_text()) for stem in wanted]
            _check_states(states, self.states, len(stems), size)
            return content["plain"], saved, states

        plain, saved, states = together(what, read)

        def put() -> None:
            put_state(plain, saved, self.model, self.optimizer)
            for name, value in self.states.items():
                _reader_and_writer(name, value)[1](decode(states[0]["states"][name]))
            _put_random(states, rank)

        together(what, put)

    def _found(self) -> dict[int, Path]:
        """What rank 0 finds, on every rank."""
        return gather(self._find() if rank_and_size()[0] == 0 else {})[0]

    def _find(self) -> dict[int, Path]:
        """The folders of checkpoints by step; one that was being replaced counts if it is alone."""
        found: dict[int, Path] = {}
        for prefix in ("replaced", "step"):
            for path in self.folder.glob(f"{prefix}-*"):
                if match := re.fullmatch(rf"{prefix}-(\d+)", path.name):
                    found[int(match[1])] = path
        return found


def _plan(held: Mapping[str, Any]) -> tuple[set[str], dict[str, Any]]:
    """The names that this rank writes, and the index of all tensors."""
    writes, index = plan_writing(gather(held))
    return writes[rank_and_size()[0]], index


def _write_index(
    folder: Path,
    step: int,
    ranks: int,
    index: Mapping[str, Any],
    plain: Mapping[str, Any],
    sums: list[tuple[str, str]],
) -> None:
    content = {
        "format": FORMAT,
        "step": step,
        "ranks": ranks,
        "torch": torch.__version__,
        "plain": plain,
        "tensors": index,
    }
    digest = write_text(folder / INDEX, json.dumps(content))
    lines = [f"{digest}  {name}\n" for name, digest in [*sums, (INDEX, digest)]]
    write_text(folder / SUMS, "".join(lines))
    folder_to_disk(folder)


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, the same words on every rank; None if it is whole.

    Each rank reads its share of the files.
    """
    return next((text for text in gather(_damage_of_share(path)) if text is not None), None)


def _damage_of_share(path: Path) -> str | None:
    rank, size = rank_and_size()
    try:
        lines = (path / SUMS).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return f"it has no {SUMS} (it was not written to its end, or by another program)"
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if INDEX not in sums:
        return f"{SUMS} does not name {INDEX}"
    for number, (name, digest) in enumerate(sorted(sums.items())):
        if number % size != rank:
            continue
        if Path(name).name != name:
            return f"{SUMS} names {name!r}, which is no file of the checkpoint"
        try:
            found = file_digest(path / name)
        except OSError as error:
            return f"{name} cannot be read ({type(error).__name__})"
        if found != digest:
            return f"{name} does not have the bytes that were written"
    if rank == 0:
        with suppress(OSError, ValueError, KeyError):
            content = json.loads((path / INDEX).read_text())
            if content["format"] != FORMAT:
                return f"its format is {content['format']}, this version reads {FORMAT}"
            needed = {
                f"rank-{n}-of-{content['ranks']}.{kind}"
                for n in range(content["ranks"])
                for kind in ("json", "safetensors")
            }
            if not needed <= set(sums):
                return f"{SUMS} does not name {sorted(needed - set(sums))}"
    return None


def _check_states(
    saved: list[dict[str, Any]], states: Mapping[str, Any], ranks: int, now: int
) -> None:
    """Refuse states that this run cannot take up.

    Raises:
        ValueError: other names; or states that differ from rank to rank, for other ranks.
    """
    first = saved[0]["states"]
    if set(first) != set(states):
        raise ValueError(
            f"states must have the checkpoint's names, {sorted(first)}, got {sorted(states)}."
        )
    for name in first:
        if any(other["states"][name] != first[name] for other in saved):
            raise ValueError(
                f"the state {name!r} differs between the {ranks} ranks that wrote the checkpoint, "
                f"so {now} ranks cannot take it up; resume on {ranks} ranks, or save a state that "
                "is the same on all of them (samples of the whole job, say)."
            )


def _put_random(saved: list[dict[str, Any]], rank: int) -> None:
    """Set this rank's generators; for another number of ranks, see `TrainingCheckpoints`."""
    for generator in saved[0]["random"]:
        states = [other["random"].get(generator) for other in saved]
        alike = all(state == states[0] for state in states)
        if alike or rank < len(saved):
            set_random_states({generator: decode(states[0 if alike else rank])})
        else:
            seed_apart(generator, states[rank % len(saved)], rank)
            logger.info(
                "random states of %s differed between the %d ranks that wrote the checkpoint: rank "
                "%d begins a stream of its own",
                generator,
                len(saved),
                rank,
            )


def _reader_and_writer(name: str, value: Any) -> tuple[Any, Any]:
    """How the state of an object is taken, and how it is put back."""
    if isinstance(value, torch.Generator):
        return value.get_state, value.set_state
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
        return value.state_dict, value.load_state_dict
    bits = getattr(value, "bit_generator", None)  # numpy's
    if bits is not None:
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    raise TypeError(
        f"states[{name!r}] must have state_dict and load_state_dict, or be a generator of torch or "
        f"numpy, got {type(value).__name__}."
    )
