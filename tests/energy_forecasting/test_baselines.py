"""Ridge regression and boosting: what they may see, and that they learn."""

from dataclasses import replace

import numpy as np
import pytest

from examples.energy_forecasting.baselines import fit_and_forecast, rows
from examples.energy_forecasting.features import Features, daily_lags, fit_scalers
from examples.energy_forecasting.holiday import holiday_days
from examples.energy_forecasting.series import HourlySeries
from tests.energy_forecasting.example_series import SMALL

pytest.importorskip("sklearn")
CONFIG = replace(SMALL, horizons=(24,), holidays="")
DAYS = 120
TRAIN_STOP = 90 * 24


def series(noise: float = 0.0) -> HourlySeries:
    """A wave of a day, less on weekends."""
    hours = np.arange(DAYS * 24)
    weekend = (hours // 24) % 7 >= 5
    values = 1000 + 100 * np.sin(hours / 24 * 2 * np.pi) - 200 * weekend
    values = values + noise * np.random.default_rng(0).normal(size=len(hours))
    times = np.datetime64("2024-01-01T00") + hours
    return HourlySeries.from_rows(times, {"demand": values}, "waves")


def features(of: HourlySeries) -> Features:
    return Features(of, CONFIG, fit_scalers(of, TRAIN_STOP))


def test_they_learn_weekends_that_naives_miss():
    of = series(noise=5.0)
    test = range(100 * 24, 114 * 24, 24)
    (found,) = fit_and_forecast(features(of), CONFIG, 0, TRAIN_STOP, [test])
    actual = of.target[np.array(test)[:, None] + np.arange(24)]
    last_day = of.target[np.array(test)[:, None] - 24 + np.arange(24)]
    naive = np.abs(last_day - actual).mean()
    for n in range(2):
        assert np.abs(found[..., n] - actual).mean() < 0.4 * naive


def test_nothing_after_training_and_origin_is_read():
    of, test = series(noise=5.0), range(100 * 24, 103 * 24, 24)
    (found,) = fit_and_forecast(features(of), CONFIG, 0, TRAIN_STOP, [test])
    changed = of.target.copy()
    changed[test[-1] :] = 9e4  # what the last forecast must not know
    again = features(HourlySeries.from_rows(of.times, {"demand": changed}, "changed"))
    (same,) = fit_and_forecast(again, CONFIG, 0, TRAIN_STOP, [test])
    assert np.array_equal(found, same)


def test_lags_are_by_hand():
    values = np.arange(1000.0)
    lags = daily_lags(values, np.array([500]), 30)
    # 30 hours ahead of hour 500: hour 482 of the last day, 362 of the last week, 194 before.
    assert lags.tolist() == [[482.0, 362.0, 194.0, 487.5, 415.5, 498.0]]


def test_missing_hours_are_filled_from_the_past():
    of = series()
    gaps = of.target.copy()
    gaps[95 * 24 : 95 * 24 + 30] = np.nan
    x, base = rows(
        features(HourlySeries.from_rows(of.times, {"d": gaps}, "x")), np.array([2304]), 5
    )
    assert np.isfinite(x).all() and np.isfinite(base).all()


def test_holidays():
    pytest.importorskip("holidays")
    days = np.array(["2024-07-04", "2024-07-05", "2024-11-28", "2025-01-01"], "datetime64[D]")
    assert holiday_days(days, "US").tolist() == [True, False, True, True]
    assert holiday_days(days, "").tolist() == [False] * 4
    assert holiday_days(days, "US-CA").tolist() == [True, False, True, True]
    for wrong in ("XX", "US-XX"):
        with pytest.raises(ValueError, match="--holidays must be a country such as 'US'"):
            holiday_days(days, wrong)


def test_a_holiday_is_one_more_column_of_the_calendar():
    pytest.importorskip("holidays")
    of = series()
    with_holidays = Features(of, replace(CONFIG, holidays="US"), fit_scalers(of, TRAIN_STOP))
    assert with_holidays.width == features(of).width + 1
    # New Year's Day of New York begins at 05:00 UTC.
    assert with_holidays.calendar[:30, -1].tolist() == [0] * 5 + [1] * 24 + [0]
