"""Training, validation and test in the order of time, and their forecast origins."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from examples.energy_forecasting.config import DAY, Config
from examples.energy_forecasting.series import HourlySeries


@dataclass(frozen=True)
class Split:
    """Hours from the series' start; an origin is 00:00 UTC, the first hour that is forecast."""

    train_stop: int
    validation: range
    test: range


def split(series: HourlySeries, config: Config) -> Split:
    """The last hours are the test, those before the validation, all before the training.

    Origins are daily. All horizons of a validation origin lie within the validation, so that the
    test plays no part in the choice of weights; a test origin has at least the shortest horizon.
    Nothing is trained on an hour at or after `train_stop`.

    Raises:
        ValueError: too few hours.
    """
    hours = len(series)
    test_start = hours - config.test_hours
    train_stop = test_start - config.validation_hours
    needed = config.context + config.history + config.longest
    if train_stop < needed:
        shortest = needed + config.validation_hours + config.test_hours
        raise ValueError(
            f"the series must be at least {shortest} hours long for a context of {config.context} "
            f"(context, {config.history} of history, {config.longest} ahead, "
            f"{config.validation_hours} of validation, {config.test_hours} of test), got {hours}; "
            "take a longer series, a shorter --context, or --excerpt."
        )
    return Split(
        train_stop,
        daily_origins(series, train_stop, test_start - config.longest + 1),
        daily_origins(series, test_start, hours - min(config.horizons) + 1),
    )


def daily_origins(series: HourlySeries, first: int, stop: int) -> range:
    """The hours 00:00 UTC in [first, stop)."""
    hour = int((series.start - series.start.astype("datetime64[D]")) / np.timedelta64(1, "h"))
    return range(first + (-(first + hour)) % DAY, stop, DAY)
