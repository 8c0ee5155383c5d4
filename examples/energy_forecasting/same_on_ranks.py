"""The point of it: one training on 1, 2 and 4 ranks, and what a rank needs for years of hours."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from examples.energy_forecasting.config import Config
from examples.energy_forecasting.evaluation import forecast_on_rank
from examples.energy_forecasting.series import HourlySeries
from examples.energy_forecasting.splits import split
from examples.energy_forecasting.training import Checkpoint, Run, train
from nnscaler_ring.tools.demo.memory import peak_memory
from nnscaler_ring.tools.launch import Rank, run_ranks

RANKS = (1, 2, 4)
FLOAT64_STEPS = 2
FORECASTS = 3
"""Test origins that are forecast by the weights of every run."""


def compare_ranks(series: HourlySeries, config: Config, steps: int, context: int) -> dict[str, Any]:
    """Train a few steps on each number of ranks; measure a step with a context of `context` hours.

    Raises:
        ValueError: the series is too short for `context`.
    """
    few = replace(config, steps=steps, validate_every=steps)
    long = replace(config, context=context, yearly=False, validation_hours=0, test_hours=0)
    split(series, long)
    runs = [_train(count, series, few) for count in RANKS]
    one = runs[0]
    return {
        "same": [
            {
                "ranks": count,
                "losses": run["losses"],
                "largest_relative_difference_of_a_loss": _relative(run["losses"], one["losses"]),
                "losses_in_float64": run["losses64"],
                "largest_relative_difference_in_float64": _relative(
                    run["losses64"], one["losses64"]
                ),
                "largest_difference_of_a_forecast": float(
                    np.abs(run["forecasts"] - one["forecasts"]).max()
                ),
            }
            for count, run in zip(RANKS, runs, strict=True)
        ],
        "context": few.context,
        "memory": {
            "context": context,
            "what": "one training step of the example: features, activations, gradients, messages",
            "by_ranks": [{"ranks": count, **_measure(count, series, long)} for count in RANKS],
        },
        "config": asdict(few),
    }


def _train(count: int, series: HourlySeries, config: Config) -> dict[str, Any]:
    saved = run_ranks(count, train, series, config, timeout_seconds=600)[0]
    exact = run_ranks(count, _train_float64, series, config, timeout_seconds=600)[0]
    origins = split(series, config).test[:FORECASTS]
    by_rank = run_ranks(count, forecast_on_rank, series, saved, [origins], timeout_seconds=600)
    found = {origin: x for parts in by_rank for origin, x in parts[0].items()}
    return {
        "losses": saved.losses,
        "losses64": exact.losses,
        "forecasts": np.stack([found[origin] for origin in origins]),
    }


def _train_float64(rank: Rank, series: HourlySeries, config: Config) -> Checkpoint:
    few = replace(config, steps=FLOAT64_STEPS, validate_every=FLOAT64_STEPS + 1)
    return train(rank, series, few, dtype=torch.float64)


def _relative(losses: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))


def _measure(count: int, series: HourlySeries, config: Config) -> dict[str, Any]:
    peaks = run_ranks(count, step_memory, series, config, timeout_seconds=600)
    return {"peak_bytes": [peak for peak, _ in peaks], "method": peaks[0][1]}


def step_memory(rank: Rank, series: HourlySeries, config: Config) -> tuple[int, str]:
    """(bytes, method): a step's peak above the level before, after a small one that loads code."""
    small = replace(config, context=1008)
    Run(rank, series, small, torch.float32).step(0)
    run = Run(rank, series, config, torch.float32)
    with peak_memory(rank.device) as peak:
        run.step(0)
    return peak.bytes, peak.method
