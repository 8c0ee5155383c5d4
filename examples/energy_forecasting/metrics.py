"""Errors of forecasts, and how sure one can be of a skill.

Forecasts and what came are [origins, hours]; NaN in what came is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

import numpy as np

Array = np.ndarray
BLOCK_DAYS = 7
REPETITIONS = 2000


class Errors(TypedDict):
    """MAE and RMSE in the series' unit, the others as fractions."""

    mae: float
    rmse: float
    wape: float
    mape: float
    one_minus_mape: float


def errors(forecast: Array, actual: Array) -> Errors:
    """Over all origins and hours."""
    seen = ~np.isnan(actual)
    difference, truth = (forecast - actual)[seen], actual[seen]
    size = np.abs(difference)
    nonzero = truth != 0
    mape = float((size[nonzero] / np.abs(truth[nonzero])).mean())
    return Errors(
        mae=float(size.mean()),
        rmse=float(np.sqrt((difference**2).mean())),
        wape=float(size.sum() / np.abs(truth).sum()),
        mape=mape,
        one_minus_mape=1 - mape,
    )


def absolute_errors(forecast: Array, actual: Array) -> Array:
    """(sum, count) per origin, [2, origins]."""
    seen = ~np.isnan(actual)
    size = np.where(seen, np.abs(forecast - np.nan_to_num(actual)), 0.0)
    return np.stack((size.sum(1), seen.sum(1)))


def skill(model: Array, naive: Array) -> float:
    """1 - MAE of the model / MAE of the naive; both as `absolute_errors`."""
    return float(1 - _mae(model) / _mae(naive))


def _mae(parts: Array) -> Array:
    return parts[0].sum(-1) / parts[1].sum(-1)


def bootstrap(statistic: Callable[..., float], *parts: Array, seed: int = 0) -> tuple[float, float]:
    """A 95 % interval of a statistic, resampling blocks of a week of origins.

    Neighbouring days have similar errors; blocks keep that. Blocks may start at any day and wrap.

    Source: Kuensch, "The Jackknife and the Bootstrap for General Stationary Observations", Annals
    of Statistics 17 (1989).
    """
    origins = parts[0].shape[-1]
    block = min(BLOCK_DAYS, origins)
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(REPETITIONS):
        starts = generator.integers(origins, size=-(-origins // block))
        chosen = ((starts[:, None] + np.arange(block)) % origins).ravel()[:origins]
        values.append(statistic(*(part[..., chosen] for part in parts)))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def coverage(low: Array, high: Array, actual: Array) -> float:
    """The fraction of what came that lies between two quantiles."""
    seen = ~np.isnan(actual)
    inside = (actual >= low) & (actual <= high)
    return float(inside[seen].mean())
