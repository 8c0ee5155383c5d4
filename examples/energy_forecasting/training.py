"""Training over any number of ranks: the same losses on each number, resumable to the bit."""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from examples.energy_forecasting.calibration import calibrate, widenings
from examples.energy_forecasting.config import DAY, Config, config_from
from examples.energy_forecasting.features import Features, Scaler, fit_scalers
from examples.energy_forecasting.model import Forecaster, pinball_loss
from examples.energy_forecasting.series import HOUR, HourlySeries
from examples.energy_forecasting.sharding import forecast_window
from examples.energy_forecasting.splits import Split, daily_origins, split
from nnscaler_ring.models import sum_gradients
from nnscaler_ring.tools.launch import Rank

ORIGINS_PER_PASS = 28
"""Days forecast from one pass over a context: the first sees `context` hours, the others more."""


@dataclass
class Checkpoint:
    """All that is needed to go on, or to forecast."""

    config: dict[str, Any]
    scalers: dict[str, tuple[float, float]]  # by column
    trained_until: str  # the first hour, UTC, that training did not see
    step: int = 0
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)  # step, loss
    seconds: float = 0.0
    ranks: int = 1
    model: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    widenings: list[list[float]] = field(default_factory=list)
    """Of the bands of the best weights, in the series' unit: see `calibration`."""
    source: str = ""
    began_by: dict[str, str] = field(default_factory=dict)  # command and code

    def save(self, path: Path) -> None:
        """All or nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".part")
        try:
            torch.save(asdict(self), beside)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    def features(self, series: HourlySeries) -> Features:
        """The features of a series, scaled as in training.

        Raises:
            ValueError: other columns than in training.
        """
        scalers = {name: Scaler(*values) for name, values in self.scalers.items()}
        return Features(series, config_from(self.config), scalers)

    def calibrate(self, quantiles: np.ndarray) -> np.ndarray:
        """Quantiles of the best weights, [..., longest, quantiles], with calibrated bands.

        Raises:
            ValueError: as `check_validated`.
        """
        self.check_validated()
        return calibrate(quantiles, self.widenings, config_from(self.config))

    def check_validated(self) -> None:
        """Raises ValueError where training stopped before its first validation."""
        if not self.widenings:
            raise ValueError(
                f"bands are calibrated at a validation, and this checkpoint of step {self.step} "
                "has seen none; go on training with the same command, without --max-minutes."
            )

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Raises ValueError for a file of something else."""
        try:
            return cls(**torch.load(path, weights_only=True))
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(
                f"{path} must be a checkpoint of this version of the example; train again, with "
                f"another --checkpoint. ({str(error).splitlines()[0]})"
            ) from None


def train(
    rank: Rank,
    series: HourlySeries,
    config: Config,
    path: Path | None = None,
    max_seconds: float = math.inf,
    began_by: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Checkpoint:
    """Train on this rank together with the others, from the checkpoint at `path` if there is one.

    Args:
        path: where rank 0 saves; None keeps nothing.
        max_seconds: stop there, to be resumed.
        began_by: the command and the code, kept in the checkpoint, so that a result can say where
            it comes from.

    Raises:
        ValueError: the checkpoint is of another run; or as `split`.
    """
    run = Run(rank, series, config, dtype)
    state = run.state
    state.began_by = began_by or {}
    if path is not None and path.exists():
        state = run.resume(Checkpoint.load(path), path)
    begin, before = time.monotonic(), state.seconds
    while state.step < config.steps:
        loss = run.step(state.step)
        state.losses.append(loss)
        state.step += 1
        if state.step % config.validate_every == 0 or state.step == config.steps:
            run.validate()
        # Rank 0's clock decides: the others would leave at another step.
        stop = run.decide(time.monotonic() - begin > max_seconds)
        state.seconds = before + time.monotonic() - begin
        if path is not None and rank.rank == 0 and (stop or run.just_validated):
            run.snapshot().save(path)
        rank.report((state.step, loss, state.validation[-1:] if run.just_validated else []))
        if stop:
            break
    return run.snapshot()


class Run:
    """A model in training on this rank.

    Args:
        rank: of the ranks that share every context.
        series, config: as in `train`.
        dtype: of weights and activations.
    """

    def __init__(
        self, rank: Rank, series: HourlySeries, config: Config, dtype: torch.dtype
    ) -> None:
        self.rank, self.series, self.config = rank, series, config
        self.group = rank.group if rank.world_size > 1 else None
        self.split: Split = split(series, config)
        scalers = fit_scalers(series, self.split.train_stop)
        self.features = Features(series, config, scalers)
        torch.manual_seed(config.seed)
        self.model = Forecaster(config, self.features.width, self.group).to(dtype)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.state = Checkpoint(
            asdict(config),
            scalers={name: astuple(scaler) for name, scaler in scalers.items()},
            trained_until=str(series.start + self.split.train_stop * HOUR),
            ranks=rank.world_size,
            source=series.source,
        )
        self.just_validated = False

    def resume(self, saved: Checkpoint, path: Path) -> Checkpoint:
        """Go on where a checkpoint of the same run stopped."""
        settings = (self.config, self.state.scalers, self.state.trained_until)
        if (config_from(saved.config), saved.scalers, saved.trained_until) != settings:
            raise ValueError(
                f"{path} was saved by a run with other settings or another series; choose another "
                "--checkpoint, or those of that run."
            )
        self.model.load_state_dict(saved.model)
        self.optimizer.load_state_dict(saved.optimizer)
        self.state = saved
        return saved

    def snapshot(self) -> Checkpoint:
        """The state with copies of the weights."""
        self.state.model = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.state.optimizer = self.optimizer.state_dict()
        return self.state

    def step(self, number: int) -> float:
        """One update; the loss is the mean over the step's origins, the same on all ranks."""
        self.just_validated = False
        config = self.config
        start, stop, origins = self._draw(number)
        for options in self.optimizer.param_groups:
            options["lr"] = learning_rate(config, number)
        mine, forecast = forecast_window(
            self.model, self.features, start, stop, origins, self.group
        )
        actual = self.features.actual(mine).to(forecast.dtype)
        loss = pinball_loss(forecast, actual, config) / len(origins)
        loss.backward()
        sum_gradients(self.model, self.group)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self._sum(loss.detach().double()).item()

    def _draw(self, number: int) -> tuple[int, int, list[int]]:
        """A random context within the training hours, and random days of it."""
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + number)
        last = self.split.train_stop - config.longest
        first = config.context + config.history
        stop = int(torch.randint(first, last + 1, (), generator=generator))
        start = stop - config.context
        earliest = max(start + DAY * config.warm_up_origins, config.history)
        days = daily_origins(self.series, earliest, stop + 1)
        chosen = torch.randperm(len(days), generator=generator)[: config.origins_per_step]
        return start, stop, [days[int(n)] for n in chosen]

    def validate(self) -> None:
        """The loss over the validation origins; the best weights are kept, their bands
        calibrated."""
        self.just_validated = True
        total = torch.zeros((), dtype=torch.float64)
        quantiles, actuals = [], []
        with torch.no_grad():
            for start, stop, origins in passes(self.split.validation, self.config):
                mine, forecast = forecast_window(
                    self.model, self.features, start, stop, origins, self.group
                )
                actual = self.features.actual(mine).to(forecast.dtype)
                total += pinball_loss(forecast, actual, self.config).double()
                quantiles.append(forecast.sort(-1).values.double())
                actuals.append(actual.double())
        loss = self._sum(total).item() / len(self.split.validation)
        if not self.state.best or loss < min(found for _, found in self.state.validation):
            self.state.best = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
            restore = self.features.scaler.restore
            self.state.widenings = widenings(
                restore(self._gather(quantiles)), restore(self._gather(actuals)), self.config
            )
        self.state.validation.append((self.state.step, loss))

    def decide(self, verdict: bool) -> bool:
        """Rank 0's verdict, on every rank."""
        agreed = torch.tensor(float(verdict))
        if self.group is not None:
            dist.broadcast(agreed, src=0)
        return bool(agreed.item())

    def _gather(self, parts: list[Tensor]) -> np.ndarray:
        """Rows of all ranks, on each."""
        mine = torch.cat(parts).numpy()
        if self.group is None:
            return mine
        found: list[Any] = [None] * self.rank.world_size
        dist.all_gather_object(found, mine)
        return np.concatenate(found)

    def _sum(self, x: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(x)
        return x


def passes(origins: range, config: Config) -> list[tuple[int, int, list[int]]]:
    """(start, stop, origins) of contexts that together forecast all origins, each from at least
    `context` hours."""
    chosen = []
    for n in range(0, len(origins), ORIGINS_PER_PASS):
        some = list(origins[n : n + ORIGINS_PER_PASS])
        chosen.append((some[0] - config.context, some[-1], some))
    return chosen


def learning_rate(config: Config, step: int) -> float:
    """A linear warm-up, then half a cosine down to a twentieth."""
    warm = min(1.0, (step + 1) / config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return config.learning_rate * warm * (0.05 + 0.95 * cosine)
