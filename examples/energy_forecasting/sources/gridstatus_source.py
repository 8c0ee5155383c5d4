"""gridstatus as an optional source: `pip install gridstatus`; it brings 33 packages along.

Tested with gridstatus 0.37.0 and pandas 2.3.3, without the network.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from examples.energy_forecasting.plausibility import DEMAND
from examples.energy_forecasting.series import HOUR, HourlySeries
from examples.energy_forecasting.sources.eia import check_range
from examples.energy_forecasting.sources.http import EmptyRangeError


def get_load(iso: str, start_date: str, end_date: str) -> HourlySeries:
    """Hourly mean load of an ISO in MW, by gridstatus.

    Args:
        iso: a class of gridstatus, such as "CAISO", "Ercot", "NYISO".
        start_date, end_date: UTC; gridstatus itself would take dates by the ISO's clocks.

    Raises:
        ModuleNotFoundError: gridstatus is not installed.
        EmptyRangeError: it has no load in the range.
        ValueError: a wrong ISO or range.
    """
    first, last = check_range(start_date, end_date)
    try:
        import gridstatus
        import pandas
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "gridstatus must be installed for this source: pip install gridstatus", name=error.name
        ) from None
    known = {found.__name__: found for found in gridstatus.all_isos}
    if iso not in known:
        raise ValueError(f"--region must be one of gridstatus's {sorted(known)}, got {iso!r}.")
    start, end = (pandas.Timestamp(str(hour), tz="UTC") for hour in (first, last + HOUR))
    # By itself it prints what fails, and leaves those days out.
    frame = known[iso]().get_load(date=start, end=end, error="raise")
    series = from_frame(frame, iso)
    kept = (series.times >= first) & (series.times <= last)  # it gives whole local days
    if not kept.any():
        raise EmptyRangeError(
            f"gridstatus has no load of {iso} from {first} to {last} UTC; check the dates."
        )
    demand = {"demand": series.target[kept]}
    return HourlySeries.from_rows(series.times[kept], demand, series.source).screened(DEMAND)


def from_frame(frame: Any, iso: str) -> HourlySeries:
    """A pandas frame with "Interval Start" (or "Time") and "Load", averaged over full hours."""
    name = "Interval Start" if "Interval Start" in frame.columns else "Time"
    times = frame[name].dt.tz_convert("UTC").dt.tz_localize(None).to_numpy("datetime64[h]")
    hours, inverse = np.unique(times, return_inverse=True)
    load = frame["Load"].to_numpy(float)
    means = np.bincount(inverse, load) / np.bincount(inverse)
    return HourlySeries.from_rows(hours, {"demand": means}, f"gridstatus {iso}")
