"""Bands that hold what they say: conformalised quantile regression on the validation.

A band of fitted quantiles is widened, or narrowed, on both sides by the same amount: the one with
which it would have held its share of the validation hours.

Source: Romano, Patterson and Candes, "Conformalized Quantile Regression", NeurIPS 2019. Its
guarantee is for exchangeable hours; those of a series are not, so coverage is measured again on the
test.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from examples.energy_forecasting.config import Config

Array = np.ndarray


def lead_groups(config: Config) -> list[slice]:
    """Hours ahead that are calibrated together: to the first horizon, from it to the next, ..."""
    edges = [0, *sorted(set(config.horizons))]
    return [slice(a, b) for a, b in pairwise(edges)]


def widenings(quantiles: Array, actual: Array, config: Config) -> list[list[float]]:
    """What each band needs on either side, per group of lead times and band from the widest.

    Args:
        quantiles: [n, longest, quantiles], rising, of the validation.
        actual: [n, longest] in the same unit; NaN is left out.

    Raises:
        ValueError: a group of lead times without an observed hour.
    """
    return [
        [
            _widening(
                quantiles[:, leads, band], quantiles[:, leads, -1 - band], actual[:, leads], share
            )
            for band, share in enumerate(shares(config))
        ]
        for leads in lead_groups(config)
    ]


def shares(config: Config) -> list[float]:
    """Of the hours, for each pair of quantiles around the median, the widest first."""
    levels = config.model.quantiles
    return [levels[-1 - n] - levels[n] for n in range(levels.index(0.5))]


def _widening(low: Array, high: Array, actual: Array, share: float) -> float:
    outside = np.maximum(low - actual, actual - high)  # negative within the band
    outside = outside[~np.isnan(outside)]
    if outside.size == 0:
        raise ValueError(
            "the validation must have observed hours at all lead times, to calibrate the bands on; "
            "take a longer series, or one with fewer gaps."
        )
    rank = min(outside.size, math.ceil(share * (outside.size + 1)))
    return float(np.partition(outside, rank - 1)[rank - 1])


def calibrate(quantiles: Array, widening: list[list[float]], config: Config) -> Array:
    """Quantiles with each band moved as `widenings` found; the median stays.

    A band is never narrower than the one within it, nor does it cross the median.

    Args:
        quantiles: [..., longest, quantiles], rising.

    Returns:
        The same shape, rising.
    """
    moved = quantiles.copy()
    bands = range(config.model.quantiles.index(0.5))
    for leads, by_band in zip(lead_groups(config), widening, strict=True):
        part = moved[..., leads, :]
        for band in reversed(bands):  # from the narrowest
            low, high = part[..., band] - by_band[band], part[..., -1 - band] + by_band[band]
            part[..., band] = np.minimum(low, part[..., band + 1])
            part[..., -1 - band] = np.maximum(high, part[..., -2 - band])
    return moved
