"""What a grid analyst would try first: ridge regression and gradient boosting, by scikit-learn.

Both see what the model's head sees of an origin, the last day and week, the calendar and holidays,
learn from the same training hours, and correct the same seasonal naive.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from examples.energy_forecasting.config import DAY, WEEK, Config
from examples.energy_forecasting.features import Features, daily_lags
from examples.energy_forecasting.splits import daily_origins

Array = np.ndarray
NAMES = ("ridge", "gradient boosting")
RIDGE_PENALTY = 1.0
MOST_ROWS = 150_000
"""Pairs of origin and lead time that boosting learns from; more are thinned evenly."""


def fit_and_forecast(
    features: Features, config: Config, first: int, train_stop: int, origins: list[range]
) -> list[Array]:
    """Forecasts of every part of origins, in the series' own unit: [origins, longest, 2].

    Args:
        first: the first hour that may be an origin, so that a week lies before it.
        train_stop: nothing at or after this hour is learned from.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    ridge, boosting, one_thread = _models()
    with one_thread():
        return _fit_and_forecast(features, config, first, train_stop, origins, ridge, boosting)


def _fit_and_forecast(
    features: Features,
    config: Config,
    first: int,
    train_stop: int,
    origins: list[range],
    ridge: Any,
    boosting: Any,
) -> list[Array]:
    learned = np.array(daily_origins_of(features, first + 2 * WEEK, train_stop - DAY))
    parts = [np.array(part) for part in origins]
    by_part = [np.zeros((len(part), config.longest, len(NAMES))) for part in parts]
    target = features.target.numpy().astype(float)
    for lead in range(config.longest):
        kept = learned[learned + lead < train_stop]
        x, base = rows(features, kept, lead)
        y = target[kept + lead] - base
        seen = ~np.isnan(y)
        model = ridge.fit(x[seen], y[seen])
        for part, found in zip(parts, by_part, strict=True):
            x, base = rows(features, part, lead)
            found[:, lead, 0] = base + model.predict(x)
    every = max(1, len(learned) * config.longest // MOST_ROWS)
    x, y = _thinned(features, learned, train_stop, config.longest, every, target)
    model = boosting.fit(x, y)
    for part, found in zip(parts, by_part, strict=True):
        for lead in range(config.longest):
            x, base = rows(features, part, lead)
            found[:, lead, 1] = base + model.predict(np.c_[x, np.full(len(x), lead)])
    return [features.scaler.restore(found) for found in by_part]


def daily_origins_of(features: Features, first: int, stop: int) -> range:
    """Midnights of UTC in [first, stop)."""
    return daily_origins(features.series, first, stop)


def rows(features: Features, origins: Array, lead: int) -> tuple[Array, Array]:
    """(what is known at each origin of the hour `lead` after it, the naive that is corrected)."""
    lags = daily_lags(features.filled.numpy().astype(float), origins, lead)
    base = (lags[:, 0] + lags[:, 1]) / 2
    calendar = features.calendar.numpy()[origins + lead]
    before = features.calendar.numpy()[origins + lead % DAY - DAY]
    return np.c_[lags - base[:, None], calendar, before[:, -1:], base], base


def _thinned(
    features: Features, origins: Array, stop: int, longest: int, every: int, target: Array
) -> tuple[Array, Array]:
    parts_x, parts_y = [], []
    for lead in range(longest):
        kept = origins[lead % every :: every]
        kept = kept[kept + lead < stop]
        x, base = rows(features, kept, lead)
        y = target[kept + lead] - base
        seen = ~np.isnan(y)
        parts_x.append(np.c_[x, np.full(len(x), lead)][seen])
        parts_y.append(y[seen])
    return np.concatenate(parts_x), np.concatenate(parts_y)


def _models() -> tuple[Any, Any, Any]:
    """Ridge, boosting, and what bounds their threads.

    One thread: on cores that others use as well, OpenMP's threads wait for each other for longer
    than they compute, 13 times as long on a busy machine of two.
    """
    try:
        from sklearn.ensemble import HistGradientBoostingRegressor
        from sklearn.linear_model import Ridge
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "scikit-learn must be installed for the baselines: pip install scikit-learn, or "
            "--baselines naive",
            name=error.name,
        ) from None
    boosting = HistGradientBoostingRegressor(
        loss="absolute_error", max_iter=200, learning_rate=0.06, min_samples_leaf=40, random_state=0
    )
    return Ridge(RIDGE_PENALTY), boosting, partial(threadpool_limits, 1)
