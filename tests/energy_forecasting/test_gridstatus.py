"""The optional source: frames as gridstatus gives them, where pandas is there to make one."""

import numpy as np
import pytest

from examples.energy_forecasting.sources.gridstatus_source import from_frame, get_load

pandas = pytest.importorskip("pandas")


def five_minutes(day, column="Load"):
    """A local day as CAISO gives it: load is the number of the five minutes."""
    starts = pandas.date_range(day, periods=288, freq="5min", tz="US/Pacific")
    return pandas.DataFrame({"Interval Start": starts, column: np.arange(288.0)})


def test_five_minute_load_becomes_hourly_means():
    series = from_frame(five_minutes("2024-03-10")[:36], "CAISO")
    assert str(series.start) == "2024-03-10T08"  # UTC, over the change of the clocks
    assert series.target.tolist() == [5.5, 17.5, 29.5]


def test_ranges_are_utc_and_whole(monkeypatch):
    gridstatus = pytest.importorskip("gridstatus")
    asked = []

    def historical(self, date, verbose=False):
        asked.append(str(date.date()))
        return five_minutes(date.date())

    monkeypatch.setattr(gridstatus.CAISO, "_get_historical_load", historical)
    series = get_load("CAISO", "2024-07-01", "2024-07-02T05")
    assert asked == ["2024-06-30", "2024-07-01"]  # Pacific days that hold those hours
    assert str(series.start) == "2024-07-01T00" and len(series) == 29
    assert series.target[0] == 17 * 12 + 5.5  # 17:00 Pacific
    with pytest.raises(ValueError, match="must be one of gridstatus's .*'CAISO'.* got 'utils'"):
        get_load("utils", "2024-07-01", "2024-07-02")


def test_a_day_that_fails_is_an_error(monkeypatch):
    gridstatus = pytest.importorskip("gridstatus")

    def historical(self, date, verbose=False):
        raise RuntimeError("no such file")

    monkeypatch.setattr(gridstatus.CAISO, "_get_historical_load", historical)
    with pytest.raises(RuntimeError, match="no such file"):
        get_load("CAISO", "2024-07-01", "2024-07-03")
