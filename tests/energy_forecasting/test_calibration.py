"""Calibrated bands hold their share of new hours, stay in order and leave the median alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from examples.energy_forecasting.calibration import calibrate, lead_groups, widenings
from examples.energy_forecasting.config import ModelConfig
from examples.energy_forecasting.evaluation import collect, forecast_on_rank, score
from examples.energy_forecasting.metrics import coverage
from examples.energy_forecasting.splits import split
from examples.energy_forecasting.training import train
from nnscaler_ring.tools.launch import run_ranks
from tests.energy_forecasting.example_series import SMALL, excerpt
from tests.energy_forecasting.test_training import ALONE

NORMAL = np.array([-1.645, -0.674, 0, 0.674, 1.645])
"""Quantiles of the standard normal at the levels of the model."""


def days(generator, origins: int, spread: tuple[float, float]):
    """Hours whose deviation on the first day and later is `spread`, but is forecast as 1."""
    level = generator.normal(size=(origins, 168)) * 5
    deviation = np.where(np.arange(168) < 24, *spread)
    return level[..., None] + NORMAL, level + generator.normal(size=level.shape) * deviation


@pytest.mark.parametrize("spread", [(2.0, 4.0), (1.0, 1.0), (0.5, 0.01)])
def test_bands_hold_their_share_of_new_hours(spread):
    generator = np.random.default_rng(0)
    quantiles, actual = days(generator, 300, spread)
    actual[5:9] = np.nan
    found = widenings(quantiles, actual, SMALL)
    new, later = days(generator, 300, spread)
    moved = calibrate(new, found, SMALL)
    assert (np.diff(moved, axis=-1) >= 0).all()
    assert np.array_equal(moved[..., 2], new[..., 2])
    for leads, deviation in zip(lead_groups(SMALL), spread, strict=True):
        for band, share in ((0, 0.9), (1, 0.5)):
            low, high = moved[:, leads, band], moved[:, leads, -1 - band]
            assert coverage(low, high, later[:, leads]) == pytest.approx(share, abs=0.02)
            assert np.allclose(high - low, deviation * 2 * NORMAL[-1 - band], rtol=0.08)


def test_a_widening_is_by_hand():
    config = replace(SMALL, horizons=(1,), model=ModelConfig(quantiles=(0.1, 0.5, 0.9)))
    quantiles = np.broadcast_to([-1.0, 0.0, 1.0], (10, 1, 3))
    actual = np.array([0.0, 0.5, 0.9, -1.2, 1.5, 2.0, -3.0, 4.0, -9.0, 12.0])[:, None]
    # 80 % of 10 + 1 hours: the ninth of -1, -0.5, -0.1, 0.2, 0.5, 1, 2, 3, 8, 11.
    assert widenings(quantiles, actual, config) == [[8.0]]
    assert calibrate(quantiles, [[3.0]], config)[0, 0].tolist() == [-4.0, 0.0, 4.0]
    assert calibrate(quantiles, [[-3.0]], config)[0, 0].tolist() == [0.0, 0.0, 0.0]


def test_a_wide_inner_band_pushes_the_outer_one():
    quantiles = np.broadcast_to(NORMAL, (1, 168, 5))
    moved = calibrate(quantiles, [[-1.0, 3.0], [0.0, 0.0]], SMALL)
    assert moved[0, 0].tolist() == [-3.674, -3.674, 0, 3.674, 3.674]
    assert np.array_equal(moved[0, 24:], quantiles[0, 24:])
    assert np.array_equal(quantiles[0, 0], NORMAL)  # a copy was moved


def test_hours_must_have_been_observed():
    quantiles, actual = days(np.random.default_rng(0), 3, (1, 1))
    actual[:, 24:] = np.nan
    with pytest.raises(ValueError, match="must have observed hours at all lead times"):
        widenings(quantiles, actual, SMALL)


def train_in_float64(rank, series):
    return train(rank, series, SMALL, dtype=torch.float64)


def test_a_trained_model_holds_its_share_of_the_validation():
    series = excerpt()
    saved = train_in_float64(ALONE, series)
    validation = split(series, SMALL).validation
    found = collect(
        series, saved, validation, [forecast_on_rank(ALONE, series, saved, [validation])[0]]
    )
    for leads in lead_groups(SMALL):
        quantiles, actual = found.quantiles[:, leads], found.actual[:, leads]
        assert coverage(quantiles[..., 0], quantiles[..., -1], actual) == pytest.approx(
            0.9, abs=0.01
        )
    assert np.array_equal(found.quantiles[..., 2], found.fitted[..., 2])
    scores = score(found, found, SMALL)["24"]
    assert scores["coverage_before_calibration"] != scores["coverage_of_90_percent_band"]
    ranks = run_ranks(2, train_in_float64, series)
    for other in ranks:
        np.testing.assert_allclose(other.widenings, saved.widenings, rtol=1e-9)


def test_bands_of_a_run_without_a_validation_are_refused():
    saved = train(ALONE, excerpt(), SMALL, max_seconds=0)
    with pytest.raises(ValueError, match="checkpoint of step 1 has seen none; go on training"):
        saved.calibrate(np.zeros((168, 5)))
