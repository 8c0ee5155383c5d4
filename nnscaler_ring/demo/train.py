"""Training over any number of ranks, each with its share of every sequence."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nnscaler_ring.core.groups import Traffic, traffic
from nnscaler_ring.core.kernels import Problem
from nnscaler_ring.demo.memory import peak_memory
from nnscaler_ring.demo.model import Decoder, ModelConfig
from nnscaler_ring.demo.shard import Shard, make_shard
from nnscaler_ring.demo.text import Corpus, Sample, draw_sample
from nnscaler_ring.launch import Rank
from nnscaler_ring.machine import usable_kernel


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


def train(rank: Rank, config: TrainConfig, corpus: Corpus, *, alone: bool) -> TrainResult:
    """Train in float32, then a few steps in float64 from the same weights.

    Args:
        alone: the whole sequence on this device, process_group=None.
    """
    group = None if alone else rank.group
    run = _Run(rank, config, corpus, group, torch.float32)
    run.warm_up()
    with peak_memory(rank.device) as memory:
        run.build()
        steps = [run.step(0)]
    rank.report(steps[0])
    for number in range(1, config.steps):
        steps.append(run.step(number))
        rank.report(steps[-1])
    exact = _Run(rank, config, corpus, group, torch.float64)
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


class _Run:
    """A model with its optimizer, on one rank of a group or alone."""

    def __init__(
        self,
        rank: Rank,
        config: TrainConfig,
        corpus: Corpus,
        group: list[int] | None,
        dtype: torch.dtype,
    ) -> None:
        self.rank, self.config, self.corpus, self.group = rank, config, corpus, group
        self.dtype = dtype
        model = config.model
        self.kernel = usable_kernel(
            Problem(
                rank.device.type,
                dtype,
                model.num_heads,
                model.num_kv_heads,
                model.head_dim,
                model.head_dim,
            )
        )

    def build(self) -> None:
        """The model, from the same float32 weights in every run and dtype, and its optimizer."""
        torch.manual_seed(self.config.seed)
        self.model = Decoder(self.config.model).to(self.rank.device, self.dtype)
        self.weights = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.weights, lr=self.config.learning_rate)

    def warm_up(self) -> None:
        """Load what the first step loads, so that it does not count as the step's memory."""
        self.build()
        sample = draw_sample(self.corpus, 8 * self.rank.world_size, seed=0, step=0)
        self._loss(sample).backward()
        self._sum_gradients()

    def step(self, number: int) -> Step:
        """One update of the weights from one sequence."""
        config = self.config
        sample = draw_sample(self.corpus, config.tokens, seed=config.seed, step=number)
        sent, start = traffic(self.group), time.perf_counter()
        for options in self.optimizer.param_groups:
            options["lr"] = learning_rate(config, number)
        loss = self._loss(sample)
        loss.backward()
        self._sum_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        total = self._sum(loss.detach()).item()
        return Step(number, total, time.perf_counter() - start, traffic(self.group) - sent)

    def _loss(self, sample: Sample) -> Tensor:
        """This rank's part of the mean over all tokens of the sequence."""
        shard = self._shard(sample)
        inputs, targets = (
            x[shard.rows].to(self.rank.device) for x in (sample.inputs, sample.targets)
        )
        logits = self.model(inputs, shard.positions, shard.attention)
        return F.cross_entropy(logits, targets, reduction="sum") / len(sample.inputs)

    def _shard(self, sample: Sample) -> Shard:
        return make_shard(
            self.config.op,
            sample.cu_seqlens,
            group=self.group,
            rank=self.rank.rank,
            device=self.rank.device,
            kernel=self.kernel,
        )

    def _sum_gradients(self) -> None:
        """Each rank has the gradient of its part of the loss: the sum is that of the loss."""
        gradients = [weight.grad for weight in self.weights if weight.grad is not None]
        summed = self._sum(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(
            gradients, summed.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))

    def _sum(self, x: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(x)
        return x

    def weights_spread(self) -> float:
        """The largest difference between a weight here and on rank 0."""
        if self.group is None:
            return 0.0
        mine = torch.cat([weight.detach().flatten() for weight in self.weights])
        first = mine.clone()
        dist.broadcast(first, src=0)
        return (mine - first).abs().max().item()


def learning_rate(config: TrainConfig, step: int) -> float:
    """A linear warm-up, then half a cosine down to a tenth."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
