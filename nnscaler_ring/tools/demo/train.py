"""Training on one device, and over any number of ranks with a share of every sequence each."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW

from nnscaler_ring.core.kernels import Problem
from nnscaler_ring.core.ranks.groups import Traffic, traffic
from nnscaler_ring.tools.demo.memory import peak_memory
from nnscaler_ring.tools.demo.model import Decoder, ModelConfig
from nnscaler_ring.tools.demo.shard import Split, positions
from nnscaler_ring.tools.demo.text import Corpus, Sample, draw_sample
from nnscaler_ring.tools.launch import Rank, check_ranks
from nnscaler_ring.tools.machine import usable_kernel
from nnscaler_ring.training import sum_gradients


@dataclass(frozen=True)
class TrainConfig:
    """One training run; all ranks and the single device get the same."""

    op: str = "zigzag"
    tokens: int = 2048  # of each step's sequence, over all ranks
    steps: int = 80
    steps_float64: int = 2  # enough to see the update of the weights
    seed: int = 0
    # Higher ones learn as fast, but a step that is too long makes rounding grow.
    learning_rate: float = 2e-3
    warmup_steps: int = 8  # Adam's first estimates are noise
    model: ModelConfig = field(default_factory=ModelConfig)


@dataclass(frozen=True)
class Step:
    """One training step as one rank saw it."""

    step: int
    loss: float  # the mean over all tokens of the sequence, the same on all ranks
    seconds: float
    sent: Traffic  # by this rank, for attention


@dataclass(frozen=True)
class TrainResult:
    """A run on one rank."""

    steps: list[Step]
    steps_float64: list[Step]
    peak_bytes: int  # of a step, above the level before the model was built
    memory_method: str
    weights: int
    weights_spread: float  # largest difference of a weight to rank 0's at the end
    kernels: dict[str, str]  # dtype -> kernel


def train(rank: Rank, kind: type[Training], config: TrainConfig, corpus: Corpus) -> TrainResult:
    """Train in float32, then a few steps in float64 from the same weights."""
    with kind.session(rank):
        kind(rank, config, corpus, torch.float32).warm_up()
        run = kind(rank, config, corpus, torch.float32)
        with peak_memory(rank.device) as memory:
            run.build()
            steps = [run.step(0)]
        rank.report(steps[0])
        for number in range(1, config.steps):
            steps.append(run.step(number))
            rank.report(steps[-1])
        exact = kind(rank, config, corpus, torch.float64)
        exact.build()
        return TrainResult(
            steps=steps,
            steps_float64=[exact.step(number) for number in range(config.steps_float64)],
            peak_bytes=memory.bytes,
            memory_method=memory.method,
            weights=sum(weight.numel() for weight in run.weights),
            weights_spread=run.weights_spread(),
            kernels={"float32": run.kernel, "float64": exact.kernel},
        )


class Training:
    """A model with its optimizer, on one device that holds the whole of every sequence."""

    def __init__(self, rank: Rank, config: TrainConfig, corpus: Corpus, dtype: torch.dtype) -> None:
        self.rank, self.config, self.corpus, self.dtype = rank, config, corpus, dtype
        self.split = Split(config.op, config.tokens)
        self.peers: list[int] | None = None  # None: nobody to talk to
        model = config.model
        heads = model.num_heads, model.num_kv_heads, model.head_dim, model.head_dim
        self.kernel = usable_kernel(Problem(rank.device.type, dtype, *heads))

    @staticmethod
    def check(ranks: int, device: str, tokens: int) -> None:
        """Whether sequences of so many tokens can be trained on so many ranks here.

        Raises:
            ValueError: they cannot; with the reason.
        """
        check_ranks(ranks, device)

    @staticmethod
    def session(rank: Rank) -> AbstractContextManager[object]:
        """What a rank enters before it trains."""
        return nullcontext()

    @staticmethod
    def attention_split(op: str, tokens: int, group: list[int]) -> Split:
        """How ranks that train this way share the sequence of one attention layer."""
        return Split(op, tokens, group)

    def build(self) -> None:
        """The model, from the same float32 weights in every run and dtype, and its optimizer."""
        torch.manual_seed(self.config.seed)
        decoder = Decoder(self.config.model, self.split.attention(self.kernel)).to(self.dtype)
        self.model, self.optimizer = self.place(decoder)
        self.weights = list(self.model.parameters())

    def place(self, decoder: Decoder) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model where it is trained, and what updates its weights."""
        decoder.to(self.rank.device)
        return decoder, AdamW(decoder.parameters(), lr=self.config.learning_rate)

    def warm_up(self) -> None:
        """Load what the first step loads, so that it does not count as the step's memory."""
        self.build()
        self.loss(self.sample(0)).backward()
        self.finish_gradients()

    def step(self, number: int) -> Step:
        """One update of the weights from one sequence."""
        sample = self.sample(number)
        sent, start = traffic(self.peers), time.perf_counter()
        for options in self.optimizer.param_groups:
            options["lr"] = learning_rate(self.config, number)
        loss = self.loss(sample)
        loss.backward()
        self.finish_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        mean = self.whole_loss(loss.detach()).item()
        return Step(number, mean, time.perf_counter() - start, traffic(self.peers) - sent)

    def sample(self, number: int) -> Sample:
        """The sequence of a step, the same on all ranks."""
        return draw_sample(self.corpus, self.config.tokens, seed=self.config.seed, step=number)

    def batch(self, sample: Sample) -> dict[str, Tensor]:
        """What the model gets of a sequence, by the names of its arguments."""
        rows = self.split.rows(self.rank.rank)
        held = {
            "inputs": sample.inputs[rows],
            "positions": positions(self.config.op, rows, sample.cu_seqlens),
            "targets": sample.targets[rows],
        }
        batch = {name: x.to(self.rank.device) for name, x in held.items()}
        if self.config.op == "varlen":
            batch["cu_seqlens"] = sample.cu_seqlens
        return batch

    def loss(self, sample: Sample) -> Tensor:
        """This rank's part of the mean over all tokens of the sequence."""
        total: Tensor = self.model(**self.batch(sample))
        return total / self.config.tokens

    def finish_gradients(self) -> None:
        """After backward: make each gradient that of the whole sequence's loss."""

    def whole_loss(self, loss: Tensor) -> Tensor:
        """The mean over the whole sequence from this rank's part."""
        return loss

    def weights_spread(self) -> float:
        """The largest difference between a weight here and on rank 0."""
        if self.peers is None:
            return 0.0
        mine = torch.cat([weight.detach().flatten() for weight in self.weights])
        first = mine.clone()
        dist.broadcast(first, src=0)
        return (mine - first).abs().max().item()


class RanksTraining(Training):
    """The same over torch.distributed alone: each rank holds a share of every sequence."""

    def __init__(self, rank: Rank, config: TrainConfig, corpus: Corpus, dtype: torch.dtype) -> None:
        super().__init__(rank, config, corpus, dtype)
        self.split = Split(config.op, config.tokens, rank.group)
        self.peers = rank.group

    def finish_gradients(self) -> None:
        """Each rank has the gradient of its part of the loss: the sum is that of the loss."""
        sum_gradients(self.model, self.peers)

    def whole_loss(self, loss: Tensor) -> Tensor:
        """The sum of all ranks' parts."""
        dist.all_reduce(loss)
        return loss


def learning_rate(config: TrainConfig, step: int) -> float:
    """A linear warm-up, then half a cosine down to a tenth."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
