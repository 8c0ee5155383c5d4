"""gridstatus as an optional source: `pip install gridstatus`; it brings 33 packages along."""

from __future__ import annotations

from typing import Any

import numpy as np

from examples.energy_forecasting.series import HourlySeries


def get_load(iso: str, start_date: str, end_date: str) -> HourlySeries:
    """Hourly mean load of an ISO in MW, by gridstatus.

    Args:
        iso: a class of gridstatus, such as "CAISO", "ERCOT", "NYISO".

    Raises:
        ModuleNotFoundError: gridstatus is not installed.
    """
    try:
        import gridstatus
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "gridstatus must be installed for this source: pip install gridstatus", name=error.name
        ) from None
    if not hasattr(gridstatus, iso):
        raise ValueError(f"iso must be a class of gridstatus, such as 'CAISO', got {iso!r}.")
    return from_frame(getattr(gridstatus, iso)().get_load(start=start_date, end=end_date), iso)


def from_frame(frame: Any, iso: str) -> HourlySeries:
    """A pandas frame with "Interval Start" (or "Time") and "Load", averaged over full hours."""
    name = "Interval Start" if "Interval Start" in frame.columns else "Time"
    times = frame[name].dt.tz_convert("UTC").dt.tz_localize(None).to_numpy("datetime64[h]")
    hours, inverse = np.unique(times, return_inverse=True)
    load = frame["Load"].to_numpy(float)
    means = np.bincount(inverse, load) / np.bincount(inverse)
    return HourlySeries.from_rows(hours, {"demand": means}, f"gridstatus {iso}")
