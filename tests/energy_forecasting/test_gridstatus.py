"""The optional source: frames as gridstatus gives them, where pandas is there to make one."""

import numpy as np
import pytest

from examples.energy_forecasting.sources.gridstatus_source import from_frame

pandas = pytest.importorskip("pandas")


def test_five_minute_load_becomes_hourly_means():
    starts = pandas.date_range("2024-03-10 00:00", periods=36, freq="5min", tz="US/Pacific")
    frame = pandas.DataFrame({"Interval Start": starts, "Load": np.arange(36.0)})
    series = from_frame(frame, "CAISO")
    assert str(series.start) == "2024-03-10T08"  # UTC, over the change of the clocks
    assert series.target.tolist() == [5.5, 17.5, 29.5]
