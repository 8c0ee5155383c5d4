"""Errors, skill, the bootstrap and the loss by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from examples.energy_forecasting.config import ModelConfig
from examples.energy_forecasting.evaluation import Forecasts, anomalies, score
from examples.energy_forecasting.metrics import absolute_errors, bootstrap, coverage, errors, skill
from examples.energy_forecasting.model import pinball_loss
from tests.energy_forecasting.example_series import SMALL

ACTUAL = np.array([[10.0, np.nan], [20.0, 40.0]])
FORECAST = np.array([[11.0, 99.0], [18.0, 44.0]])


def test_errors_leave_missing_hours_out():
    found = errors(FORECAST, ACTUAL)
    assert found["mae"] == pytest.approx(7 / 3)
    assert found["rmse"] == pytest.approx(np.sqrt(7))
    assert found["wape"] == pytest.approx(7 / 70)
    assert found["mape"] == pytest.approx(0.1)
    assert found["one_minus_mape"] == pytest.approx(0.9)


def test_skill_is_relative_to_the_naive():
    model = absolute_errors(FORECAST, ACTUAL)
    naive = absolute_errors(np.zeros((2, 2)), ACTUAL)
    assert skill(model, naive) == pytest.approx(1 - 7 / 70)
    assert skill(naive, model) == pytest.approx(1 - 70 / 7)  # published where it is negative, too


def test_the_interval_holds_weeks_together():
    generator = np.random.default_rng(0)
    weekly = np.repeat(generator.normal(size=50), 7)
    parts = np.stack((3 + weekly, np.ones(350)))
    mean = lambda x: float(x[0].sum() / x[1].sum())  # noqa: E731
    low, high = bootstrap(mean, parts)
    assert low < mean(parts) < high
    expected = 2 * 1.96 * weekly.std() / np.sqrt(50)
    assert high - low == pytest.approx(
        expected, rel=0.25
    )  # by single days it would be 2.6 times less
    assert bootstrap(mean, parts) == (low, high)


def test_coverage():
    assert coverage(np.full((2, 2), 10.0), np.full((2, 2), 20.0), ACTUAL) == pytest.approx(2 / 3)


def test_pinball_loss_is_least_at_the_quantile():
    config = replace(SMALL, horizons=(1,), model=ModelConfig(quantiles=(0.2,)))
    actual = torch.arange(1.0, 101).unsqueeze(1)
    losses = [
        pinball_loss(torch.full((100, 1, 1), guess), actual, config).item()
        for guess in (10.0, 20.5, 31.0)
    ]
    assert losses[1] < min(losses[0], losses[2])
    unseen = torch.full((3, 1), torch.nan)
    assert pinball_loss(torch.ones(3, 1, 1), unseen, config) == 0


def forecasts(actual: np.ndarray, naives: np.ndarray, median: float) -> Forecasts:
    origins, hours = actual.shape
    spread = np.array([-2, -1, 0, 1, 2.0])
    return Forecasts(
        origins=np.datetime64("2024-01-01T00") + np.arange(origins) * np.timedelta64(24, "h"),
        quantiles=np.broadcast_to(median + spread, (origins, hours, 5)),
        fitted=np.broadcast_to(median + spread / 4, (origins, hours, 5)),
        actual=actual,
        naives=naives,
        available=np.full(origins, 168),
    )


def test_the_naive_is_chosen_on_the_validation():
    # The first naive is best there; on the test another one would be, which must not count.
    actual = np.full((10, 168), 10.0)
    validation = forecasts(actual, np.stack((actual + 1, actual + 2, actual + 3), -1), 10.5)
    test = forecasts(actual, np.stack((actual + 3, actual + 2, actual + 1), -1), 10.5)
    found = score(validation, test, SMALL)["168"]
    assert found["best_naive"] == "same hour of the last day"
    assert found["skill"] == pytest.approx(1 - 0.5 / 3)
    assert found["coverage_of_90_percent_band"] == 1
    assert found["coverage_before_calibration"] == 1  # 0.5 away, as far as the narrow band
    assert found["document_target_one_minus_mape"] == 0.8


def test_only_whole_horizons_count():
    actual = np.full((10, 168), 10.0)
    part = forecasts(actual, np.stack((actual + 1,) * 3, -1), 10.0)
    part.available[-4:] = 24
    found = score(part, part, SMALL)
    assert found["24"]["origins"] == 10 and found["168"]["origins"] == 6


def test_anomalies_are_what_validation_did_not_see():
    usual = np.random.default_rng(0).normal(10, 0.5, (200, 168))
    strange = usual[:5].copy()
    strange[3, 7] = 30
    strange[3, 30] = 90  # on the second day: not a day-ahead forecast
    naives = np.stack((usual,) * 3, -1)
    found = anomalies(forecasts(usual, naives, 10), forecasts(strange, naives[:5], 10), SMALL)
    assert found[0]["hour"] == "2024-01-04T07" and found[0]["actual"] == 30
    assert found[0]["surprise"] == 10 and len(found) < 5
