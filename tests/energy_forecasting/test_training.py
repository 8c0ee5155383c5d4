"""The same training on any number of ranks, and a resumed one, to the bit."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.energy_forecasting.evaluation import check_origins, forecast_on_rank
from examples.energy_forecasting.splits import split
from examples.energy_forecasting.training import Checkpoint, passes, train
from nnscaler_ring.tools.launch import Rank, RankError, run_ranks
from tests.energy_forecasting.example_series import SMALL, excerpt

ALONE = Rank(0, 1, torch.device("cpu"), lambda value: None, Path())


def train_and_forecast(rank, series, config, origins):
    saved = train(rank, series, config, dtype=torch.float64)
    return saved, forecast_on_rank(rank, series, saved, [origins])[0]


def test_ranks_train_and_forecast_as_one_device():
    series, config = excerpt(), SMALL
    origins = split(series, config).test[:3]
    one, expected = train_and_forecast(ALONE, series, config, origins)
    results = run_ranks(3, train_and_forecast, series, config, origins)
    assert one.losses[0] != one.losses[-1]
    for saved, _ in results:
        np.testing.assert_allclose(saved.losses, one.losses, rtol=1e-12)
        np.testing.assert_allclose(saved.validation, one.validation, rtol=1e-12)
        for name, weight in one.model.items():
            torch.testing.assert_close(saved.model[name], weight, rtol=0, atol=1e-12)
    found = {origin: x for _, part in results for origin, x in part.items()}
    assert sorted(found) == list(origins)
    assert sum(len(part) for _, part in results) == len(origins)  # each by one rank
    for origin, quantiles in expected.items():
        np.testing.assert_allclose(found[origin], quantiles, rtol=1e-6)  # float32 weights
        assert (np.diff(quantiles, axis=-1) >= 0).all()


def test_training_goes_on_to_the_bit(tmp_path):
    series, path = excerpt(), tmp_path / "new" / "checkpoint.pt"
    whole = train(ALONE, series, SMALL)
    stops = 0
    while (part := train(ALONE, series, SMALL, path, max_seconds=0)).step < SMALL.steps:
        stops += 1
    assert stops == SMALL.steps - 1
    saved = Checkpoint.load(path)
    assert part.losses == saved.losses == whole.losses
    assert saved.validation == whole.validation and saved.seconds > 0
    for name, weight in whole.model.items():
        assert torch.equal(saved.model[name], weight)
        assert torch.equal(saved.best[name], whole.best[name])
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.pt"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    series, path = excerpt(), tmp_path / "checkpoint.pt"
    train(ALONE, series, SMALL, path, max_seconds=0)
    with pytest.raises(ValueError, match="was saved by a run with other settings"):
        train(ALONE, series, replace(SMALL, seed=1), path)
    with pytest.raises(RankError, match="was saved by a run with other settings"):
        run_ranks(2, train, series, replace(SMALL, seed=1), path)
    path.write_text("not a checkpoint")
    with pytest.raises(
        ValueError, match="must be a checkpoint of this version of the example; train again"
    ):
        Checkpoint.load(path)


def test_a_model_does_not_forecast_what_it_was_trained_on():
    series = excerpt()
    saved = train(ALONE, series, SMALL, max_seconds=0)
    origins = split(series, SMALL).test
    check_origins(series, saved, origins)
    first = series.until(origins[0])
    with pytest.raises(ValueError, match="must begin where training stopped, 2024-12-04T00 UTC"):
        check_origins(first, saved, range(2400, 2401))
    short = type(series)(series.times[-400], {"demand": series.target[-400:]}, series.quality)
    with pytest.raises(
        ValueError, match="must have 505 hours before the first forecast .* got 400"
    ):
        check_origins(short, saved, range(400, 401))


def test_later_hours_do_not_change_how_a_series_is_scaled():
    series = excerpt()
    saved = train(ALONE, series.until(4000), SMALL, max_seconds=0)
    longer = saved.features(series)
    assert torch.equal(longer.target[:4000], saved.features(series.until(4000)).target)


def test_seeds_differ_and_repeat():
    series, config = excerpt(), replace(SMALL, steps=1)
    losses = [train(ALONE, series, replace(config, seed=seed)).losses for seed in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]


def test_training_reads_nothing_of_validation_and_test():
    series = excerpt()
    stop = split(series, SMALL).train_stop
    changed = type(series)(series.start, {"demand": series.target.copy()}, series.quality)
    changed.target[stop:] *= 3
    few = replace(SMALL, steps=2, validate_every=3)
    ours, theirs = (train(ALONE, x, few) for x in (series, changed))
    assert ours.losses == theirs.losses
    assert all(torch.equal(ours.model[name], theirs.model[name]) for name in ours.model)
    assert ours.validation != theirs.validation


def test_every_origin_has_its_context():
    origins = range(1000, 1000 + 24 * 60, 24)
    found = passes(origins, SMALL)
    assert [origin for _, _, some in found for origin in some] == list(origins)
    for start, stop, some in found:
        assert start == some[0] - SMALL.context and stop == some[-1]
