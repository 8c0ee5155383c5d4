"""The commands, end to end, on the shipped excerpt: from data to a forecast plot."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from examples.energy_forecasting import cli
from examples.energy_forecasting.sources.csv_file import read_csv
from tests.energy_forecasting.example_series import SMALL
from tests.energy_forecasting.server import KEY, eia, hours, serving


def run(*arguments: str):
    return CliRunner().invoke(cli.commands, list(map(str, arguments)))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(cli, "EXCERPT", SMALL)


def test_from_data_to_a_forecast_plot(tmp_path, small):
    series, checkpoint, out = tmp_path / "load.csv", tmp_path / "run" / "c.pt", tmp_path / "out"
    done = run("data", "csv", "--csv", cli.EXCERPT_CSV, "--out", series)
    assert done.exit_code == 0, done.output
    assert "4416 rows on 4416 hours; complete" in done.output
    given = ("--csv", series, "--checkpoint", checkpoint, "--ranks", "2")
    prices = tmp_path / "prices.csv"
    rows = (f"{hour},{n % 7}" for n, hour in enumerate(read_csv(series).times))
    prices.write_text("\n".join(["time_utc,price", *rows]))
    given += ("--join", prices)
    done = run("train", *given, "--excerpt", "--steps", "3", "--seed", "5")
    assert done.exit_code == 0 and "step 3 of 3 (done)" in done.output, done.output
    done = run("evaluate", *given, "--out", out)
    assert done.exit_code == 0, done.output
    assert "gradient boosting" in done.output and "The model loses to" in done.output
    assert "The band is NOT one of 90 %" in done.output or "The 90 % band holds" in done.output
    results = json.loads((out / "results.json").read_text())
    assert set(results["horizons"]) == {"24", "168"}
    assert -1 < results["horizons"]["24"]["skill"] < 1
    assert results["config"]["seed"] == 5 and results["training"]["ranks"] == 2
    provenance = results["provenance"]
    assert provenance["versions"]["torch"] and "energy_forecasting" in provenance["command"]
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4  # and nothing from elsewhere
    assert page.count("src=") == 4 and "href" not in page
    done = run("forecast", *given[:-2], "--out", out)
    assert done.exit_code == 2 and "the columns ['demand', 'price'], as in training" in done.output
    done = run("forecast", *given, "--out", out)
    assert done.exit_code == 0, done.output
    assert (out / "forecast.png").read_bytes().startswith(b"\x89PNG")
    forecast = read_csv(out / "forecast.csv", target="quantile_0.5", channels=["quantile_0.95"])
    assert len(forecast) == 168 and str(forecast.start) == "2025-01-01T00"
    assert (forecast.columns["quantile_0.95"] >= forecast.target).all()
    assert 300_000 < forecast.target.mean() < 700_000  # MW, the lower 48 states


@pytest.mark.full
def test_ranks_compare(tmp_path, small):
    done = run("ranks", "--context", "500", "--steps", "2", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "ranks.json").read_text())
    for entry in found["same"]:
        assert entry["largest_relative_difference_in_float64"] < 1e-12
        assert entry["largest_relative_difference_of_a_loss"] < 1e-5
    assert [entry["ranks"] for entry in found["memory"]["by_ranks"]] == [1, 2, 4]
    assert all(peak > 0 for entry in found["memory"]["by_ranks"] for peak in entry["peak_bytes"])


def test_online_with_a_key(tmp_path, monkeypatch):
    values = {period: str(n) for n, period in enumerate(hours("2024-01-01", 48))}
    with serving(eia(values)) as served:
        monkeypatch.setenv("EIA_API_KEY", KEY)
        monkeypatch.setattr("examples.energy_forecasting.sources.eia.URL", served.url)
        out = tmp_path / "us48.csv"
        done = run("data", "eia", "--start", "2024-01-01", "--end", "2024-01-03", "--out", out)
    assert done.exit_code == 0 and KEY not in done.output, done.output
    assert np.array_equal(read_csv(out).target, np.arange(48))
    assert KEY not in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("data", "eia", "--start", "2024-01-01", "--end", "2024-01-02"), "api_key must be given"),
        (("data", "eia"), "--start and --end must be given"),
        (("data", "caiso", "--start", "x", "--end", "y"), "start_date must be a UTC date"),
        (
            ("data", "caiso", "--start", "2024", "--end", "2025", "--what", "generation"),
            "--what generation must be something that caiso has",
        ),
        (
            ("data", "gridstatus", "--start", "2024-01-01", "--end", "2024-01-02"),
            "pip install gridstatus",
        ),
    ],
)
def test_a_failed_fetch_writes_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.delenv("EIA_API_KEY", raising=False)
    out = tmp_path / "out.csv"
    done = run(*arguments, "--out", out)
    assert done.exit_code == 2 and message in " ".join(done.output.split()), done.output
    assert list(tmp_path.iterdir()) == []


def test_wrong_settings_are_one_line(tmp_path):
    checkpoint = tmp_path / "c.pt"
    done = run("train", "--context", "9000", "--checkpoint", checkpoint)
    assert done.exit_code == 2 and "the series must be at least" in done.output
    done = run("train", "--context", "10", "--checkpoint", checkpoint)
    assert done.exit_code == 2 and "--context must be at least 168, got 10" in done.output
    done = run("evaluate", "--checkpoint", checkpoint)
    assert done.exit_code == 2 and "does not exist; run train first" in done.output
    assert not checkpoint.exists()
