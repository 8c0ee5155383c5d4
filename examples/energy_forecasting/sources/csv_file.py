"""Plain CSV, local or UTC times, any column names."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np

from examples.energy_forecasting.plausibility import ANY, DEMAND, RULE, is_no_demand
from examples.energy_forecasting.series import TIME, HourlySeries

TIME_COLUMNS = (TIME, "date_time", "datetime", "time", "timestamp", "period")
TARGET_COLUMNS = ("demand", "cleaned demand (MW)", "demand_mw", "load", "value")
MISSING = ("", "missing", "empty", "na", "nan", "null", "none")
REMEDIES = {
    "time_column": f"rename the column of hours to {TIME!r}",
    "target": "name the column to forecast (--target)",
    "channels": "name columns that it has (--channel)",
}
FLAG, GOOD = "category", "OKAY"
"""Imputed values that the published EIA files flag in a column; they count as missing."""


def read_csv(
    path: Path,
    *,
    time_column: str | None = None,
    target: str | None = None,
    channels: Sequence[str] = (),
    time_zone: str = "UTC",
    quantity: str = DEMAND,
) -> HourlySeries:
    """An hourly CSV file.

    Rows that are empty are left out, also at hours that clocks skip.

    Args:
        time_column: None finds one of the usual names.
        target: the column to forecast; None finds one of the usual names.
        channels: more columns to keep.
        time_zone: of times without an offset, such as "America/Los_Angeles". Where clocks go back
            an hour comes twice: the first is daylight-saving time.
        quantity: "demand" counts values that demand cannot have as missing, see
            `plausibility.RULE`; "any" is for prices and all else that may be below 0.

    Raises:
        ValueError: no rows, a missing or doubled column, a time or a number that cannot be read, or
            too many values that are no demand.
    """
    names = _names(path)
    target = _find(path, "target", target, TARGET_COLUMNS, names)
    for channel in channels:
        _find(path, "channels", channel, (), names)
    series = _read(path, time_column, [target, *(c for c in channels if c != target)], time_zone)
    series = series.screened(quantity, *[ANY] * (len(series.columns) - 1))
    count = series.quality.implausible_values
    if quantity == DEMAND and is_no_demand(count, series.quality.rows):
        raise ValueError(
            f"{target} of {path.name} must be demand, got {count} values in "
            f"{series.quality.rows} rows that are none ({RULE}); if it is something else, give "
            "--quantity any."
        )
    columns = dict(series.columns)
    return replace(series, columns={"demand": columns.pop(target), **columns})


def read_columns(path: Path, *, time_zone: str = "UTC") -> HourlySeries:
    """Every column of an hourly CSV file beside the time, under its own name.

    Raises:
        ValueError: as `read_csv`.
    """
    time_column = _find(path, "time_column", None, TIME_COLUMNS, _names(path))
    names = [name for name in _names(path) if name != time_column]
    return _read(path, time_column, names, time_zone).screened(ANY)


def _names(path: Path) -> list[str]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            names = list(csv.DictReader(file).fieldnames or [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{path.name} must be a CSV file in UTF-8 ({error}); save it as one, unpacked."
        ) from None
    if not names:
        raise ValueError(f"{path.name} must begin with a line of column names, got an empty file.")
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(
            f"{path.name} must have every column once, got {doubled} again; rename or drop them."
        )
    return names


def _read(
    path: Path, time_column: str | None, wanted: Sequence[str], time_zone: str
) -> HourlySeries:
    """Some columns; the first is what FLAG speaks of."""
    try:
        zone = ZoneInfo(time_zone)
    except (ZoneInfoNotFoundError, ValueError):
        raise ValueError(
            f"time_zone must be an IANA name such as 'America/New_York', got {time_zone!r}."
        ) from None
    time_column = _find(path, "time_column", time_column, TIME_COLUMNS, _names(path))
    times: list[np.datetime64] = []
    columns: dict[str, list[float]] = {name: [] for name in wanted}
    seen: set[datetime] = set()
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            for row in reader:
                where = f"{path.name} line {reader.line_num}"
                if _is_blank(row):
                    continue
                if _is_longer(row):
                    raise ValueError(
                        f"rows must have as many values as there are names, got more in {where}; "
                        "write numbers without a comma for thousands, or in quotation marks."
                    )
                values = {name: _number(row[name], name, where) for name in wanted}
                is_empty = all(np.isnan(value) for value in values.values())
                time = _time(row[time_column] or "", zone, seen, where, is_empty=is_empty)
                if time is None:
                    continue
                times.append(time)
                for name, value in values.items():
                    columns[name].append(value)
                if row.get(FLAG, GOOD) not in (GOOD, None, ""):
                    columns[wanted[0]][-1] = np.nan
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{path.name} must be a CSV file in UTF-8, got one that cannot be read ({error})."
        ) from None
    arrays = {name: np.array(values) for name, values in columns.items()}
    return HourlySeries.from_rows(times, arrays, path.name)


def _find(
    path: Path, argument: str, name: str | None, usual: Sequence[str], names: list[str]
) -> str:
    found = [n for n in ((name,) if name else usual) if n in names]
    if not found:
        remedy = REMEDIES[argument] if len(names) > 1 else "separate columns by commas"
        which = f"one of {names}, got {name!r}" if name else f"named one of {[*usual]}, got {names}"
        raise ValueError(f"{argument} must be a column of {path.name} {which}; {remedy}.")
    return found[0]


def _is_blank(row: dict[str, str]) -> bool:
    """Whether a row has commas alone, as spreadsheets leave them behind a table."""
    values = [value for name, value in row.items() if name is not None]
    return not _is_longer(row) and not any(value and value.strip() for value in values)


def _is_longer(row: dict[str, str]) -> bool:
    """Whether a row has values behind the last column; csv gathers them under None."""
    more: Sequence[str] = row.get(None, ())  # type: ignore[call-overload]
    return any(value.strip() for value in more)


def _time(
    text: str, zone: ZoneInfo, seen: set[datetime], where: str, *, is_empty: bool
) -> np.datetime64 | None:
    """The UTC time of a row; None of an empty one at an hour that clocks skip."""
    try:
        # Python 3.10 does not read the Z.
        time = datetime.fromisoformat(re.sub("[Zz]$", "+00:00", text.strip()))
    except ValueError:
        raise ValueError(
            f"times must be like '2024-01-31 05:00', got {text!r} in {where}."
        ) from None
    if time.tzinfo is None:
        time = time.replace(tzinfo=zone, fold=int(time in seen and _is_twice(time, zone)))
        seen.add(time.replace(tzinfo=None, fold=0))
    try:
        utc = time.astimezone(timezone.utc)
    except OverflowError:
        raise ValueError(
            f"times must be in the years 1 to 9999 of UTC, got {text!r} in {where}."
        ) from None
    if utc.microsecond:
        raise ValueError(f"times must be full hours, got {text!r} in {where}; resample first.")
    if (
        utc.astimezone(zone).replace(tzinfo=None) != time.replace(tzinfo=None)
        and time.tzinfo is zone
    ):
        if is_empty:
            return None
        raise ValueError(
            f"{text!r} in {where} does not exist in {zone.key}: clocks go forward then."
        )
    return np.datetime64(utc.replace(tzinfo=None), "s")


def _is_twice(time: datetime, zone: ZoneInfo) -> bool:
    offsets: set[timedelta | None] = {
        time.replace(tzinfo=zone, fold=fold).utcoffset() for fold in (0, 1)
    }
    return len(offsets) == 2


def _number(text: str | None, name: str, where: str) -> float:
    if text is None or text.strip().lower() in MISSING:
        return np.nan
    try:
        value = float(text)
    except ValueError:
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(
            f"{name} must hold numbers, got {text!r} in {where}; leave what is missing empty."
        )
    return value
