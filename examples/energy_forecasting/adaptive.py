"""Bands that hold what they say while hours change: adaptive conformal inference.

The amount by which a band is widened is found again at every origin: from the forecasts of the days
before it, as far as their hours have come, and at a level that follows the share of hours that the
bands missed so far. Nothing later than an origin is used for its bands.

Source: Gibbs and Candes, "Adaptive Conformal Inference Under Distribution Shift", NeurIPS 2021,
with the scores of conformalised quantile regression (see calibration.py).
"""

from __future__ import annotations

import math

import numpy as np

from examples.energy_forecasting.calibration import calibrate, lead_groups, shares
from examples.energy_forecasting.config import Config

Array = np.ndarray
STEP = 0.02
"""How far one day's misses move the level: larger follows faster and is less steady."""

MEMORY_DAYS = 365
"""Origins whose errors count: a year, so that every season is in it where there is one."""

LEAST, MOST = 0.85, 0.95
"""Shares of the hours between which a band is called one of 90 %."""


def adapt(fitted: Array, actual: Array, origins: Array, config: Config) -> Array:
    """Fitted quantiles with bands that are widened or narrowed origin by origin.

    Args:
        fitted: [origins, longest, quantiles], rising, before any calibration.
        actual: [origins, longest]; NaN is missing or not known yet.
        origins: int64 [origins], rising; the hour that each forecast begins with.

    Returns:
        As `fitted`. The first origins have no past to learn from and stay as they are.
    """
    groups, targets = lead_groups(config), shares(config)
    scores = [_outside(fitted, actual, band) for band in range(len(targets))]
    hours = origins[:, None] + np.arange(fitted.shape[1])
    issued = [[np.full(len(origins), np.nan) for _ in targets] for _ in groups]
    levels = [list(targets) for _ in groups]
    adapted = fitted.copy()
    for n, now in enumerate(origins):
        past = slice(max(0, n - MEMORY_DAYS), n)
        before = origins[n - 1] if n else now
        widening: list[list[float]] = []
        for g, leads in enumerate(groups):
            widening.append([])
            for band, share in enumerate(targets):
                known = hours[past, leads] < now
                score = scores[band][past, leads]
                is_new = known & (hours[past, leads] >= before)
                amounts = np.broadcast_to(issued[g][band][past, None], score.shape)
                counted = is_new & ~np.isnan(score) & ~np.isnan(amounts)
                if counted.any():
                    missed = float((score[counted] > amounts[counted]).mean())
                    levels[g][band] += STEP * (missed - (1 - share))
                seen = score[known & ~np.isnan(score)]
                if seen.size:
                    issued[g][band][n] = _quantile(seen, levels[g][band])
                widening[g].append(float(np.nan_to_num(issued[g][band][n])))
        adapted[n] = calibrate(fitted[n], widening, config)
    return adapted


def holds(coverage: float) -> bool:
    """Whether a band that held this share of hours may be called one of 90 %."""
    return LEAST <= coverage <= MOST


def _outside(fitted: Array, actual: Array, band: int) -> Array:
    """How far each hour lies outside a band; negative within it, NaN where it is missing."""
    return np.maximum(fitted[..., band] - actual, actual - fitted[..., -1 - band])


def _quantile(scores: Array, level: float) -> float:
    """What all but a share 1 - level of the scores stay below, for a sample of this size."""
    rank = min(scores.size, max(1, math.ceil(level * (scores.size + 1))))
    return float(np.partition(scores, rank - 1)[rank - 1])
