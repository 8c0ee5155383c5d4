"""Rolling daily origins: errors per horizon, skill over the best seasonal naive, and anomalies."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from examples.energy_forecasting.adaptive import MEMORY_DAYS, adapt, holds
from examples.energy_forecasting.baselines import NAMES as BASELINES
from examples.energy_forecasting.config import DAY, Config, config_from
from examples.energy_forecasting.features import check_columns, naive_names
from examples.energy_forecasting.metrics import (
    absolute_errors,
    bootstrap,
    coverage,
    errors,
    skill,
)
from examples.energy_forecasting.model import Forecaster
from examples.energy_forecasting.series import HOUR, HourlySeries
from examples.energy_forecasting.sharding import forecast_window
from examples.energy_forecasting.training import Checkpoint, passes
from nnscaler_ring.tools.launch import Rank

Array = np.ndarray
FEWEST_DAYS = 28
"""Of forecasts whose hours have come, before bands follow them."""

FALSE_ALARMS = 0.001
"""The share of validation hours that the anomaly threshold lets through."""

DOCUMENT_TARGETS = {24: 0.90, 168: 0.80, 720: 0.70}
"""1 - MAPE as the project's source document wants it; seasonal naives pass it already."""


@dataclass(frozen=True)
class Forecasts:
    """Of one part of the series, in its own unit."""

    origins: Array  # datetime64[h]
    quantiles: Array  # [origins, longest, quantiles], rising, calibrated
    fitted: Array  # the same before calibration
    actual: Array  # [origins, longest]; NaN is missing or not known yet
    naives: Array  # [origins, longest, candidates]
    available: Array  # [origins] hours that the series has from the origin on
    fixed: Array | None = None  # quantiles as the checkpoint calibrates them, not adapted
    learned: Array | None = None  # [origins, longest, baselines] of baselines.NAMES

    def within(self, horizon: int) -> Array:
        """The origins whose whole horizon the series has."""
        return self.available >= horizon


def forecast_on_rank(
    rank: Rank, series: HourlySeries, saved: Checkpoint, origins: list[range]
) -> list[dict[int, Array]]:
    """For every range of origins, those that this rank owns -> quantiles [longest, quantiles],
    rising, not yet calibrated."""
    config = config_from(saved.config)
    group = rank.group if rank.world_size > 1 else None
    features = saved.features(series)
    model = Forecaster(config, features.width, group)
    model.load_state_dict(saved.best or saved.model)
    model.eval()
    results: list[dict[int, Array]] = []
    with torch.no_grad():
        for part in origins:
            found: dict[int, Array] = {}
            for start, stop, some in passes(part, config):
                mine, forecast = forecast_window(model, features, start, stop, some, group)
                # Quantiles of one hour are fitted apart and may cross by a little.
                values = features.scaler.restore(forecast.sort(-1).values.double().numpy())
                found |= dict(zip(mine.tolist(), values, strict=True))
                rank.report(len(mine))
            results.append(found)
    return results


def check_origins(series: HourlySeries, saved: Checkpoint, origins: range) -> None:
    """Whether a trained model may forecast these origins of a series.

    Raises:
        ValueError: other columns than in training, too little history before the first origin, or
            training has seen its hours.
    """
    check_columns(series, saved.scalers)
    config = config_from(saved.config)
    needed = config.context + config.history
    if origins[0] < needed:
        raise ValueError(
            f"the series must have {needed} hours before the first forecast (a context of "
            f"{config.context} and {config.history} of history), got {origins[0]}; take a longer "
            "series, or train with a shorter --context."
        )
    first = series.start + origins[0] * HOUR
    if first < np.datetime64(saved.trained_until):
        raise ValueError(
            f"forecasts must begin where training stopped, {saved.trained_until} UTC, or later, "
            f"got {first}; take a series that goes on, or train on this one."
        )


def collect(
    series: HourlySeries, saved: Checkpoint, origins: range, by_rank: list[dict[int, Array]]
) -> Forecasts:
    """The forecasts of all ranks with what came and what seasonal naives say."""
    quantiles = {origin: x for found in by_rank for origin, x in found.items()}
    features = saved.features(series)
    hours = torch.tensor(list(origins), dtype=torch.int64)
    restore = features.scaler.restore
    fitted = np.stack([quantiles[origin] for origin in origins])
    return Forecasts(
        origins=series.start + np.array(list(origins)) * HOUR,
        quantiles=saved.calibrate(fitted),
        fitted=fitted,
        actual=restore(features.actual(hours).double().numpy()),
        naives=restore(features.naives(hours).double().numpy()),
        available=len(series) - np.array(list(origins)),
    )


def with_adapted_bands(
    validation: Forecasts, test: Forecasts, config: Config
) -> tuple[Forecasts, Forecasts]:
    """Both with the bands of adaptive.py: the test's follow the validation's and each other."""
    fitted = np.concatenate((validation.fitted, test.fitted))
    actual = np.concatenate((validation.actual, test.actual))
    hours = np.concatenate((validation.origins, test.origins)).astype("datetime64[h]").astype(int)
    adapted = adapt(fitted, actual, hours, config)
    count = len(validation.origins)
    return (
        replace(validation, quantiles=adapted[:count], fixed=validation.quantiles),
        replace(test, quantiles=adapted[count:], fixed=test.quantiles),
    )


def past_origins(series: HourlySeries, saved: Checkpoint, origin: int) -> range:
    """The daily origins up to `origin`, at most a year, at which the model may forecast."""
    config = config_from(saved.config)
    trained = int((np.datetime64(saved.trained_until) - series.start) / HOUR)
    first = max(trained, config.context + config.history, origin - MEMORY_DAYS * DAY)
    return range(origin - (origin - first) // DAY * DAY, origin + 1, DAY)


def latest_bands(made: Forecasts, config: Config) -> tuple[Array, str, bool]:
    """The last forecast's quantiles, what its bands are worth, and whether they are known to hold.

    Its bands follow the days before it; where those are fewer than `FEWEST_DAYS`, they are those
    of the checkpoint.
    """
    days = len(made.origins) - 1
    if days < FEWEST_DAYS:
        return (
            made.quantiles[-1],
            f"Its bands were calibrated once, on the validation: only {days} days of forecasts "
            f"before it have come, and {FEWEST_DAYS} are needed to follow them.",
            False,
        )
    hours = made.origins.astype("datetime64[h]").astype(int)
    adapted = adapt(made.fitted, made.actual, hours, config)
    recent = slice(-1 - FEWEST_DAYS, -1)
    held = _coverage(adapted[recent, :DAY], made.actual[recent, :DAY])
    name = "90 % band" if holds(held) else "widest band, which is NOT one of 90 %,"
    told = (
        f"Over the {FEWEST_DAYS} days before it the {name} held {held:.1%} of the day-ahead hours."
    )
    return adapted[-1], told, holds(held)


def score(validation: Forecasts, test: Forecasts, config: Config) -> dict[str, Any]:
    """Per horizon, as results/*.json has it. The best naive is chosen on the validation."""
    median = config.model.quantiles.index(0.5)
    names = naive_names(config)
    scores: dict[str, Any] = {}
    for horizon in config.horizons:
        kept = test.within(horizon)
        actual = test.actual[kept, :horizon]
        on_validation = [
            errors(validation.naives[:, :horizon, n], validation.actual[:, :horizon])["mae"]
            for n in range(len(names))
        ]
        best = int(np.argmin(on_validation))
        forecast = test.quantiles[kept, :horizon]
        model = absolute_errors(forecast[..., median], actual)
        naive = absolute_errors(test.naives[kept, :horizon, best], actual)
        low, high = bootstrap(skill, model, naive)
        others = {
            name: errors(test.naives[kept, :horizon, n], actual) for n, name in enumerate(names)
        }
        learned = {}
        if test.learned is not None:
            learned = {
                name: errors(test.learned[kept, :horizon, n], actual)
                for n, name in enumerate(BASELINES)
            }
        own = errors(forecast[..., median], actual)
        held = _coverage(test.quantiles[kept, :horizon], actual)
        scores[str(horizon)] = {
            "skill": skill(model, naive),
            "skill_95_percent": [low, high],
            "best_naive": names[best],
            "origins": int(kept.sum()),
            "model": own,
            "naives": others,
            "baselines": learned,
            "loses_to": [n for n, e in (others | learned).items() if e["mae"] < own["mae"]],
            "coverage_of_90_percent_band": held,
            "band_holds_90_percent": holds(held),
            "coverage_calibrated_once": None
            if test.fixed is None
            else _coverage(test.fixed[kept, :horizon], actual),
            "coverage_before_calibration": _coverage(test.fitted[kept, :horizon], actual),
            "document_target_one_minus_mape": DOCUMENT_TARGETS.get(horizon),
        }
    return scores


def _coverage(quantiles: Array, actual: Array) -> float:
    return coverage(quantiles[..., 0], quantiles[..., -1], actual)


def why_no_anomalies(scores: dict[str, Any], config: Config) -> str | None:
    """Why no hour is called anomalous, where the day-ahead band does not hold; else None."""
    held = scores[str(min(config.horizons))]["coverage_of_90_percent_band"]
    if holds(held):
        return None
    return f"the day-ahead band holds {held:.1%} of the test's hours, not about 90 %"


def anomalies(validation: Forecasts, test: Forecasts, config: Config) -> list[dict[str, Any]]:
    """Test hours that the forecast of the day before did not think possible, worst first.

    An hour's surprise is its distance from the median in half widths of the 90 % band. The
    threshold is the validation's quantile that `FALSE_ALARMS` of its hours exceed.
    """
    threshold = float(np.nanquantile(_surprise(validation, config), 1 - FALSE_ALARMS))
    surprise = _surprise(test, config)
    median = config.model.quantiles.index(0.5)
    found = []
    for origin, lead in np.argwhere(np.nan_to_num(surprise) > threshold):
        found.append(
            {
                "hour": str(test.origins[origin] + lead * HOUR),
                "actual": round(float(test.actual[origin, lead]), 1),
                "forecast": round(float(test.quantiles[origin, lead, median]), 1),
                "surprise": round(float(surprise[origin, lead]), 2),
                "threshold": round(threshold, 2),
            }
        )
    return sorted(found, key=lambda hour: -hour["surprise"])


def _surprise(part: Forecasts, config: Config) -> Array:
    day = slice(0, DAY)
    median = part.quantiles[:, day, config.model.quantiles.index(0.5)]
    half = (part.quantiles[:, day, -1] - part.quantiles[:, day, 0]) / 2
    return np.abs(part.actual[:, day] - median) / np.maximum(half, 1e-9)


def by_lead_day(test: Forecasts, config: Config) -> dict[str, list[float]]:
    """MAE of the model and of every naive for each day ahead."""
    median = config.model.quantiles.index(0.5)
    series = {"model": test.quantiles[..., median]}
    series |= {name: test.naives[..., n] for n, name in enumerate(naive_names(config))}
    days = math.ceil(config.longest / DAY)
    kept = test.within(config.longest)
    return {
        name: [
            errors(
                values[kept, d * DAY : (d + 1) * DAY], test.actual[kept, d * DAY : (d + 1) * DAY]
            )["mae"]
            for d in range(days)
        ]
        for name, values in series.items()
    }
