"""The whole demonstration: both trainings, then the memory of an attention layer against N."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Protocol

import torch

from nnscaler_ring.tools.demo.memory import AttentionSize, PeakMemory, attention_memory
from nnscaler_ring.tools.demo.nnscaler_train import NnScalerTraining
from nnscaler_ring.tools.demo.text import Corpus, check_length, load_corpus
from nnscaler_ring.tools.demo.train import (
    RanksTraining,
    Step,
    TrainConfig,
    Training,
    TrainResult,
    train,
)
from nnscaler_ring.tools.launch import run_ranks

ENGINES: dict[str, type[Training]] = {"torch": RanksTraining, "nnscaler": NnScalerTraining}
"""Who shards the training: this package over torch.distributed alone, or nnScaler's plan."""

FLOAT64_LIMIT = 1e-12
"""Relative difference of two float64 losses that are sums of the same terms in another order."""


@dataclass(frozen=True)
class DemoConfig:
    """What the demonstration runs."""

    engine: str = "torch"  # of ENGINES
    ranks: int = 2
    device: str = "cpu"
    text: Path | None = None  # None: Python's standard library
    train: TrainConfig = field(default_factory=TrainConfig)
    attention: AttentionSize = field(default_factory=AttentionSize)
    memory_ranks: tuple[int, ...] = (1, 2, 4)  # enough points to see a line

    @property
    def ranks_name(self) -> str:
        """The ranks in a sentence."""
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return ranks + (" under nnScaler" if self.engine == "nnscaler" else "")


class Watch(Protocol):
    """Who wants to see how it goes."""

    def start(self, stage: str, total: int) -> None:
        """A stage of `total` steps begins."""

    def advance(self, step: Step | None) -> None:
        """A step of the stage is done."""


@dataclass(frozen=True)
class DemoResult:
    """Everything that was measured."""

    corpus: Corpus
    alone: TrainResult
    ranks: list[TrainResult]
    memory: dict[int, list[PeakMemory]]  # number of ranks -> one for each
    seconds: float

    @property
    def largest_difference(self) -> float:
        """Of the float32 losses, relative."""
        return max(differences(self.alone.steps, self.ranks[0].steps))

    @property
    def largest_difference_float64(self) -> float:
        """Of the float64 losses, relative."""
        return max(differences(self.alone.steps_float64, self.ranks[0].steps_float64))

    @property
    def is_equal(self) -> bool:
        """Whether both trainings are the same one, up to rounding."""
        return self.largest_difference_float64 <= FLOAT64_LIMIT


def differences(alone: Sequence[Step], ranks: Sequence[Step]) -> list[float]:
    """Relative difference of the losses of each step; infinite where one is not a number."""
    pairs = [(a.loss, b.loss) for a, b in zip(alone, ranks, strict=True)]
    return [
        abs(a - b) / abs(a) if math.isfinite(a) and math.isfinite(b) else math.inf for a, b in pairs
    ]


def tokens_per_second(result: TrainResult, tokens: int) -> float:
    """Over all ranks, of a step of median duration; the first one is left out as a warm-up."""
    return tokens / median(step.seconds for step in result.steps[1:] or result.steps)


def prepare(config: DemoConfig) -> Corpus:
    """The text, when this machine can run the demonstration.

    Raises:
        ValueError: it cannot, or the text is missing or too short.
    """
    ENGINES[config.engine].check(config.ranks, config.device, config.train.tokens)
    corpus = load_corpus(config.text)
    check_length(corpus, config.train.tokens)
    return corpus


def run_demo(config: DemoConfig, corpus: Corpus, watch: Watch) -> DemoResult:
    """Run everything; a minute or two with the usual settings on two cores."""
    start = time.monotonic()
    engine = ENGINES[config.engine]
    alone = _train("one device", 1, Training, config, corpus, watch)
    ranks = _train(config.ranks_name, config.ranks, engine, config, corpus, watch)
    memory = {}
    for count in _memory_ranks(config):
        watch.start(f"memory of attention, N = {count}", 1)
        size = config.attention
        split = engine.attention_split(config.train.op, size.tokens, list(range(count)))
        memory[count] = run_ranks(count, attention_memory, split, size, device=config.device)
        watch.advance(None)
    return DemoResult(corpus, alone[0], ranks, memory, time.monotonic() - start)


def _memory_ranks(config: DemoConfig) -> list[int]:
    if config.device == "cpu":
        return list(config.memory_ranks)
    return [count for count in config.memory_ranks if count <= torch.cuda.device_count()]


def _train(
    stage: str,
    count: int,
    kind: type[Training],
    config: DemoConfig,
    corpus: Corpus,
    watch: Watch,
) -> list[TrainResult]:
    watch.start(stage, config.train.steps)

    def advance(rank: int, step: Step) -> None:
        if rank == 0:
            watch.advance(step)

    return run_ranks(
        count, train, kind, config.train, corpus, device=config.device, on_report=advance
    )
