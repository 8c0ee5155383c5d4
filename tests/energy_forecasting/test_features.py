"""Features look back only; the calendar follows the clocks; baselines repeat what was."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from examples.energy_forecasting.config import YEAR, Config
from examples.energy_forecasting.features import (
    Features,
    Scaler,
    calendar,
    fill_forward,
    fit_scalers,
)
from examples.energy_forecasting.series import HourlySeries
from examples.energy_forecasting.splits import split
from tests.energy_forecasting.example_series import SMALL, excerpt

HOURS = np.timedelta64(1, "h")


def features_of(series, config, train_stop):
    return Features(series, config, fit_scalers(series, train_stop))


def series_of(values, start="2024-01-01T00", **channels):
    times = np.datetime64(start) + np.arange(len(values)) * HOURS
    columns = {"demand": np.asarray(values, float), **channels}
    return HourlySeries.from_rows(times, columns, "made up")


def with_values(series, values, hours):
    target = series.target.copy()
    target[hours] = values
    return HourlySeries(series.start, {"demand": target}, series.quality)


def test_nothing_of_a_token_or_an_origin_is_later():
    series, now = excerpt(), 2000
    later = with_values(series, 1e6, slice(now, None))
    ours, theirs = (features_of(x, SMALL, 1500) for x in (series, later))
    hours = torch.arange(now - 300, now)
    assert torch.equal(ours.tokens(hours), theirs.tokens(hours))
    assert not torch.equal(ours.tokens(hours + 1), theirs.tokens(hours + 1))
    origin = torch.tensor([now])
    for mine, other in zip(ours.ahead(origin), theirs.ahead(origin), strict=True):
        assert torch.equal(mine, other)
    assert (ours.actual(origin) != theirs.actual(origin)).all()


def test_the_scaler_sees_training_hours_only():
    series = excerpt()
    features = features_of(with_values(series, 1e9, slice(1500, None)), SMALL, 1500)
    assert features.scaler == features_of(series, SMALL, 1500).scaler
    assert features.target[:1500].mean().abs() < 1e-5
    assert features.target[:1500].std() == pytest.approx(1, abs=1e-3)


def test_a_constant_series_cannot_be_scaled():
    with pytest.raises(ValueError, match="a series must vary to be scaled, got 5 observed values"):
        Scaler.fit(np.array([3, 3, np.nan, 3, 3, 3]))


def test_missing_hours_are_filled_from_before_and_masked():
    values = np.arange(60.0)
    values[[0, 5, 30, 31, 54]] = np.nan
    filled = fill_forward(values)
    assert filled[[0, 5, 30, 31, 54]].tolist() == [0, 4, 6, 7, 6]  # 54 - 24 was itself filled
    features = features_of(series_of(np.tile(values, 20)), SMALL, 1000)
    token = features.tokens(torch.tensor([31, 32]))
    recent = SMALL.recent
    assert token[:, recent].tolist() == [0, 1]  # was this hour observed?
    assert token[1, recent + 1] == pytest.approx(22 / 24)  # the share of the last day


def test_a_token_carries_its_last_week():
    features = features_of(excerpt(), SMALL, 1500)
    token = features.tokens(torch.tensor([500, 3]))
    assert torch.equal(token[0, : SMALL.recent], features.target[500 - 167 : 501])
    assert token[1, : SMALL.recent - 4].eq(0).all()


def test_channels_widen_the_tokens():
    values = np.sin(np.arange(1200))
    features = features_of(series_of(values, price=np.cos(np.arange(1200))), SMALL, 800)
    alone = features_of(series_of(values), SMALL, 800)
    assert features.width == alone.width + 24
    assert features.tokens(torch.arange(5)).shape == (5, features.width)
    with pytest.raises(ValueError, match=r"column 'price': a series must vary"):
        features_of(series_of(values, price=np.zeros(1200)), SMALL, 800)


def test_a_model_gets_the_columns_it_was_trained_with():
    values = np.sin(np.arange(1200))
    scalers = fit_scalers(series_of(values, price=np.cos(values)), 800)
    with pytest.raises(ValueError, match=r"the columns \['demand', 'price'\], as in training, got"):
        Features(series_of(values), SMALL, scalers)


def test_the_calendar_follows_the_clocks():
    # 17:00 in New York is 22:00 UTC in winter and 21:00 UTC in summer.
    winter = calendar(np.datetime64("2024-01-15T22"), 1, "America/New_York")
    summer = calendar(np.datetime64("2024-07-15T21"), 1, "America/New_York")
    assert torch.allclose(winter[0, :6], summer[0, :6])
    assert winter[0, -7:].tolist() == [1, 0, 0, 0, 0, 0, 0]  # a Monday
    assert not torch.allclose(winter[0, 12:18], summer[0, 12:18])  # the season


def test_seasonal_naives_repeat_the_last_day_week_and_year():
    values = np.random.default_rng(0).normal(size=YEAR + 3000)
    config = replace(Config(), context=200, horizons=(24, 400))
    features = features_of(series_of(values), config, 2000)
    origin, lead = YEAR + 500, torch.arange(400)
    naives = features.naives(torch.tensor([origin]))[0]
    target = features.target
    assert torch.equal(naives[:24, 0], target[origin - 24 : origin])
    assert torch.equal(naives[24:48, 0], target[origin - 24 : origin])
    assert torch.equal(naives[:168, 1], target[origin - 168 : origin])
    assert torch.equal(naives[:, 2], (naives[:, 0] + naives[:, 1]) / 2)
    assert torch.equal(naives[:, 3], target[origin - YEAR + lead])


def test_parts_follow_each_other():
    series = excerpt()
    parts = split(series, SMALL)
    assert parts.train_stop == len(series) - 28 * 24
    assert parts.validation[0] == parts.train_stop and len(parts.validation) == 8
    assert parts.validation[-1] + 168 == parts.test[0] == len(series) - 14 * 24
    assert len(parts.test) == 14 and parts.test[-1] + 24 == len(series)
    days = (series.times[list(parts.test)] - series.times[0]) / HOURS
    assert (days % 24 == 0).all()


def test_origins_are_midnights_wherever_a_series_starts():
    series = series_of(np.random.default_rng(0).normal(size=3000), start="2024-01-01T07")
    for origin in split(series, SMALL).test:
        assert str(series.times[origin]).endswith("T00")


def test_a_short_series_is_told_how_long_it_must_be():
    with pytest.raises(ValueError, match=r"must be at least 1345 hours long for a context of 337"):
        split(series_of(np.arange(1344)), SMALL)
    split(series_of(np.arange(1345)), SMALL)
