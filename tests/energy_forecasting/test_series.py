"""Rows on an unbroken clock: order, gaps, duplicates, local time, resolutions, files."""

import numpy as np
import pytest

from examples.energy_forecasting.series import HourlySeries
from examples.energy_forecasting.sources.csv_file import read_csv


def series_of(times, values, source="rows"):
    return HourlySeries.from_rows(
        np.array(times, dtype="datetime64[s]"), {"demand": np.array(values, float)}, source
    )


def write(tmp_path, text):
    path = tmp_path / "load.csv"
    path.write_text(text)
    return path


def test_gaps_duplicates_and_order_are_reported():
    times = ["2024-01-01T03", "2024-01-01T00", "2024-01-01T00", "2024-01-01T00"]
    series = series_of(times, [3, 0, 0, 9])
    assert np.array_equal(series.target, [9, np.nan, np.nan, 3], equal_nan=True)
    quality = series.quality
    assert (quality.rows, quality.hours, quality.gap_hours) == (4, 4, 2)
    assert (quality.duplicate_rows, quality.conflicting_rows, quality.unordered_rows) == (2, 1, 1)
    assert quality.sentence() == (
        "4 rows on 4 hours; 2 gap hours, 2 missing values, 2 duplicate rows, 1 conflicting rows, "
        "1 unordered rows"
    )


def test_times_are_full_hours():
    with pytest.raises(ValueError, match="times must be full hours, got 2024-01-01T00:15:00"):
        series_of(["2024-01-01T00:15"], [1])


@pytest.mark.parametrize(("year", "hours"), [(2023, 8760), (2024, 8784)])
def test_leap_years_and_resolutions(year, hours):
    times = np.arange(f"{year}-01-01T00", f"{year + 1}-01-01T00", dtype="datetime64[h]")
    series = series_of(times, np.arange(len(times)))
    assert len(series) == hours
    starts, daily = series.resample("daily")
    assert len(starts) == hours // 24 and daily["demand"][1] == np.arange(24, 48).mean()
    months, monthly = series.resample("monthly")
    assert [str(month) for month in months[:2]] == [f"{year}-01", f"{year}-02"]
    assert monthly["demand"][0] == np.arange(744).mean()


def test_incomplete_days_have_no_mean():
    times = np.arange("2024-01-01T00", "2024-01-02T23", dtype="datetime64[h]")
    _, daily = series_of(times, np.ones(47)).resample("daily")
    assert np.array_equal(daily["demand"], [1, np.nan], equal_nan=True)


def test_resolution_is_checked():
    with pytest.raises(ValueError, match="resolution must be one of"):
        series_of(["2024-01-01T00"], [1]).resample("weekly")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    series = series_of(["2024-01-01T00", "2024-01-01T02"], [1.5, 2])
    path = tmp_path / "new" / "series.csv"
    series.write_csv(path)
    assert path.read_text() == (
        "time_utc,demand\n2024-01-01T00,1.5\n2024-01-01T01,\n2024-01-01T02,2\n"
    )
    again = read_csv(path)
    assert np.array_equal(again.target, series.target, equal_nan=True)
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        series_of(["2024-01-01T00"], [9]).write_csv(path)
    assert "1.5" in path.read_text() and [p.name for p in path.parent.iterdir()] == ["series.csv"]


def test_channels_are_put_on_the_same_clock():
    series = series_of(["2024-01-01T00", "2024-01-01T03"], [0, 3])
    other = HourlySeries.from_rows(
        np.array(["2024-01-01T02", "2024-01-01T05"], "datetime64[h]"),
        {"price": np.array([20.0, 50.0])},
        "prices",
    )
    joined = series.with_columns(other)
    assert np.array_equal(joined.columns["price"], [np.nan, np.nan, 20, np.nan], equal_nan=True)


def test_usual_columns_are_found_and_imputed_hours_are_missing(tmp_path):
    path = write(
        tmp_path,
        "date_time,raw demand (MW),category,cleaned demand (MW)\n"
        "2020-01-01 00:00:00,MISSING,MISSING,5\n2020-01-01 01:00:00,7,OKAY,7\n",
    )
    assert np.array_equal(read_csv(path).target, [np.nan, 7], equal_nan=True)
    raw = read_csv(path, target="raw demand (MW)", channels=["cleaned demand (MW)"])
    assert list(raw.columns) == ["demand", "cleaned demand (MW)"]


def test_clocks_go_back_and_forward(tmp_path):
    back = "2024-11-03 00:00,0\n2024-11-03 01:00,1\n2024-11-03 01:00,2\n2024-11-03 02:00,3\n"
    series = read_csv(write(tmp_path, "time,load\n" + back), time_zone="America/Los_Angeles")
    assert series.target.tolist() == [0, 1, 2, 3] and series.quality.duplicate_rows == 0
    assert str(series.start) == "2024-11-03T07"
    forward = "2024-03-10 01:00,1\n2024-03-10 03:00,3\n"
    series = read_csv(write(tmp_path, "time,load\n" + forward), time_zone="America/Los_Angeles")
    assert series.target.tolist() == [1, 3] and series.quality.gap_hours == 0
    missing = write(tmp_path, "time,load\n2024-03-10 02:00,2\n")
    with pytest.raises(ValueError, match="line 2 does not exist in America/Los_Angeles"):
        read_csv(missing, time_zone="America/Los_Angeles")


def test_offsets_in_the_file_win(tmp_path):
    path = write(tmp_path, "time,load\n2024-01-01T00:00:00-08:00,1\n2024-01-01T09:00:00Z,2\n")
    assert str(read_csv(path, time_zone="Asia/Tokyo").start) == "2024-01-01T08"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            "time,mw\n",
            {},
            r"target must be a column of load.csv named one of .*, got \['time', 'mw'\]; name",
        ),
        ("time,load\n", {}, "load.csv must hold at least one row, got none"),
        ("time,load\nsoon,1\n", {}, "got 'soon' in load.csv line 2"),
        (
            "time,load\n2024-01-01,much\n",
            {},
            "load must hold numbers, got 'much' in load.csv line 2",
        ),
        ("when,load\n", {}, "time_column must be a column"),
        ("time,load\n", {"channels": ["x"]}, "channels must be a column of .* got 'x'"),
        ("time,load\n", {"time_zone": "Mars/Base"}, "time_zone must be an IANA name"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, text, options, message):
    with pytest.raises(ValueError, match=message):
        read_csv(write(tmp_path, text), **options)
