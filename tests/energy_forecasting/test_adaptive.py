"""Bands that follow the days before them, and what is said of those that do not hold."""

import numpy as np
import pytest

from examples.energy_forecasting import adaptive
from examples.energy_forecasting.adaptive import adapt, holds
from examples.energy_forecasting.evaluation import Forecasts, latest_bands, why_no_anomalies
from examples.energy_forecasting.metrics import coverage
from examples.energy_forecasting.plots import forecast_figure
from examples.energy_forecasting.scores_table import verdict
from tests.energy_forecasting.example_series import SMALL
from tests.energy_forecasting.test_calibration import NORMAL

DAY = 24


def made(generator, days: int, deviation):
    """Forecasts of deviation 1 for hours whose deviation changes by the day: fitted, actual, hours.

    `deviation`: a function of the day.
    """
    length = days * DAY + 168
    noise = generator.normal(size=length) * deviation(np.arange(length) / DAY)
    hours = np.arange(days) * DAY
    actual = noise[hours[:, None] + np.arange(168)]
    return np.broadcast_to(NORMAL, (days, 168, 5)).copy(), actual, hours


@pytest.mark.parametrize(
    "deviation",
    [
        lambda day: 1 + 0 * day,
        lambda day: 3 + 0 * day,
        lambda day: np.where(day < 150, 1.0, 2.5),  # another year
        lambda day: np.where(day < 150, 2.5, 1.0),
        lambda day: 2 + np.sin(day / 20),
    ],
    ids=["as fitted", "wider", "grows", "shrinks", "in waves"],
)
def test_bands_hold_where_hours_change(deviation):
    fitted, actual, hours = made(np.random.default_rng(0), 300, deviation)
    adapted = adapt(fitted, actual, hours, SMALL)
    assert (np.diff(adapted, axis=-1) >= 0).all()
    assert np.array_equal(adapted[..., 2], fitted[..., 2])
    later = slice(60, None)
    for leads in (slice(0, 24), slice(24, 168)):
        held = coverage(adapted[later, leads, 0], adapted[later, leads, -1], actual[later, leads])
        assert holds(held), held


def test_nothing_later_than_an_origin_counts():
    generator = np.random.default_rng(1)
    fitted, actual, hours = made(generator, 40, lambda day: 2 + 0 * day)
    before = adapt(fitted, actual, hours, SMALL)
    changed = actual.copy()
    changed[hours[:, None] + np.arange(168) >= hours[20]] += 1000
    after = adapt(fitted, changed, hours, SMALL)
    assert np.array_equal(before[:21], after[:21])
    assert not np.array_equal(before[22], after[22])


def test_missing_hours_teach_nothing():
    fitted, actual, hours = made(np.random.default_rng(2), 10, lambda day: 1 + 0 * day)
    assert np.array_equal(adapt(fitted, np.full_like(actual, np.nan), hours, SMALL), fitted)
    assert np.isfinite(adapt(fitted, np.where(actual > 0, np.nan, actual), hours, SMALL)).all()


def test_a_level_moves_with_the_misses_by_hand(monkeypatch):
    """Half of a day's hours are missed: 0.9 goes up by 0.02 * (0.5 - 0.1)."""
    asked: list[tuple[int, float]] = []
    quantile = adaptive._quantile

    def listen(scores: np.ndarray, level: float) -> float:
        asked.append((scores.size, round(level, 6)))
        return quantile(scores, level)

    monkeypatch.setattr(adaptive, "_quantile", listen)
    actual = np.zeros((3, 168))
    actual[1, :12] = 99.0
    fitted = np.broadcast_to(NORMAL, (3, 168, 5))
    adapt(fitted, actual, np.array([0, 24, 48]), SMALL)
    # The widest band and the inner one: the first day is known at the second origin, the second
    # day's misses at the third.
    assert asked[:4] == [(24, 0.9), (24, 0.5), (48, 0.908), (48, 0.5)]


def scores(held: float) -> dict:
    error = {"mae": 100.0, "one_minus_mape": 0.9}
    return {
        "skill": 0.1,
        "skill_95_percent": (0.0, 0.2),
        "best_naive": "mean of both",
        "model": error,
        "naives": {"mean of both": error | {"mae": 111.0}},
        "baselines": {"ridge": error | {"mae": 80.0}},
        "loses_to": ["ridge"],
        "coverage_of_90_percent_band": held,
        "band_holds_90_percent": holds(held),
    }


def test_the_verdict_says_who_is_better_and_what_the_band_is():
    told = verdict("24", scores(0.91))
    assert "skill +0.100 (+0.000 to +0.200) over 'mean of both'" in told[0]
    assert told[1] == "  The model loses to ridge (by 25.0%)."
    assert told[2] == "  The 90 % band holds 91.0% of the hours."
    told = verdict("24", scores(0.494) | {"loses_to": []})
    assert told[1] == "  No forecast that was compared is better."
    assert told[2] == "  The band is NOT one of 90 %: it holds 49.4% of the hours."


def test_no_anomalies_where_the_band_does_not_hold():
    assert why_no_anomalies({"24": scores(0.9), "168": scores(0.5)}, SMALL) is None
    assert why_no_anomalies({"24": scores(0.6)}, SMALL).startswith("the day-ahead band holds 60.0%")


@pytest.mark.parametrize(("days", "message"), [(5, "only 5 days of"), (60, "the 90 % band held")])
def test_the_latest_forecast_says_what_its_bands_are_worth(days, message):
    fitted, actual, hours = made(np.random.default_rng(3), days + 1, lambda day: 1 + 0 * day)
    forecasts = Forecasts(
        origins=np.datetime64("2024-01-01T00") + hours,
        quantiles=fitted + 7,
        fitted=fitted,
        actual=actual,
        naives=np.zeros((*actual.shape, 3)),
        available=np.full(days + 1, 168),
    )
    quantiles, told, is_held = latest_bands(forecasts, SMALL)
    assert is_held == (days == 60)
    assert message in told and quantiles.shape == (168, 5)
    assert (quantiles[0, 2] == 7) == (days == 5)  # the checkpoint's own, or those that follow


def test_a_band_that_does_not_hold_is_not_called_by_its_share():
    quantiles = np.broadcast_to(NORMAL, (24, 5))
    origin = np.datetime64("2024-01-01T00")
    for held, first in ((True, "90% band"), (False, "widest band, not 90 %")):
        figure = forecast_figure(origin, quantiles, SMALL, holds=held)
        assert figure.legends[0].get_texts()[0].get_text() == first
