"""Hourly series on one unbroken clock: what every source returns and every file holds.

Times are UTC, so that a day has 24 hours whatever the clocks do. Gaps become NaN, duplicates are
counted, and nothing is filled in: that is the features' work.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np

from examples.energy_forecasting.plausibility import implausible

HOUR = np.timedelta64(1, "h")
MOST_HOURS = 100 * 8766
"""A century: a year that was mistyped would make millions of empty hours."""

Array = np.ndarray
TIME = "time_utc"
RESOLUTIONS = {"hourly": "h", "daily": "D", "monthly": "M"}


@dataclass(frozen=True)
class Quality:
    """What was found while rows were put on the clock."""

    rows: int = 0
    hours: int = 0
    gap_hours: int = 0  # hours without a row
    missing_values: int = 0  # of the first column, gaps included
    duplicate_rows: int = 0  # a later row of the same hour; the last one counts
    conflicting_rows: int = 0  # of these, those with another value
    unordered_rows: int = 0  # rows earlier than the one before
    implausible_values: int = 0  # of all columns; they count as missing, see plausibility.RULE

    def sentence(self) -> str:
        """For people."""
        found = {name: n for name, n in asdict(self).items() if n and name not in ("rows", "hours")}
        notes = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in found.items())
        return f"{self.rows} rows on {self.hours} hours; {notes or 'complete'}"


@dataclass(frozen=True)
class HourlySeries:
    """Columns of float64 on consecutive hours from `start` (UTC); NaN is missing.

    The first column is what is forecast.
    """

    start: np.datetime64
    columns: dict[str, Array]
    quality: Quality
    source: str = ""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @property
    def times(self) -> Array:
        """datetime64[h] of every hour."""
        return self.start + np.arange(len(self)) * HOUR

    @property
    def target(self) -> Array:
        """The first column."""
        return next(iter(self.columns.values()))

    @classmethod
    def from_rows(
        cls, times: Sequence[np.datetime64] | Array, columns: Mapping[str, Array], source: str
    ) -> HourlySeries:
        """Rows in any order put on the clock.

        Raises:
            ValueError: no rows, times that are not full hours, or more than `MOST_HOURS`.
        """
        stamps = np.asarray(times, dtype="datetime64[s]")
        if not len(stamps):
            raise ValueError(f"{source} must hold at least one row, got none.")
        hours = stamps.astype("datetime64[h]")
        if (hours != stamps).any():
            odd = stamps[hours != stamps][0]
            raise ValueError(f"times must be full hours, got {odd} in {source}; resample first.")
        start = hours.min()
        length = int((hours.max() - start) / HOUR) + 1
        if length > MOST_HOURS:
            raise ValueError(
                f"{source} must span at most {MOST_HOURS:,} hours, got {start} to {hours.max()}; "
                "look for a mistyped year."
            )
        index = ((hours - start) / HOUR).astype(int)
        held = {name: np.full(length, np.nan) for name in columns}
        seen = np.zeros(length, dtype=bool)
        duplicates = conflicts = 0
        for row, hour in enumerate(index):
            if seen[hour]:
                duplicates += 1
                conflicts += any(
                    not _same(held[name][hour], values[row]) for name, values in columns.items()
                )
            seen[hour] = True
            for name, values in columns.items():
                held[name][hour] = values[row]
        first = next(iter(held.values()))
        quality = Quality(
            rows=len(hours),
            hours=length,
            gap_hours=int((~seen).sum()),
            missing_values=int(np.isnan(first).sum()),
            duplicate_rows=duplicates,
            conflicting_rows=conflicts,
            unordered_rows=int((np.diff(index) < 0).sum()),
        )
        return cls(start, held, quality, source)

    def screened(self, quantity: str, *others: str) -> HourlySeries:
        """The same with implausible values missing, and counted; see `plausibility.RULE`.

        Args:
            quantity: what the first column is.
            others: what the others are; by default the same.
        """
        quantities = (quantity, *(others or (quantity,) * (len(self.columns) - 1)))
        columns, count = {}, 0
        for (name, values), what in zip(self.columns.items(), quantities, strict=True):
            wrong = implausible(values, what)
            columns[name] = np.where(wrong, np.nan, values)
            count += int(wrong.sum())
        quality = replace(
            self.quality,
            missing_values=int(np.isnan(next(iter(columns.values()))).sum()),
            implausible_values=self.quality.implausible_values + count,
        )
        return HourlySeries(self.start, columns, quality, self.source)

    def with_columns(self, others: HourlySeries) -> HourlySeries:
        """The same hours with more channels; what the others do not cover is missing.

        Raises:
            ValueError: a column that is there already, or no hour in common.
        """
        columns = dict(self.columns)
        known = sorted(set(columns) & set(others.columns))
        if known:
            raise ValueError(
                f"columns of {others.source} must have names of their own, got {known} again; "
                "rename them there."
            )
        offset = int((others.start - self.start) / HOUR)
        if offset >= len(self) or offset + len(others) <= 0:
            raise ValueError(
                f"{others.source} must have hours of {self.source}, from {self.start} UTC on, got "
                f"{len(others)} from {others.start} on; fetch the same range."
            )
        for name, values in others.columns.items():
            column = np.full(len(self), np.nan)
            a, b = max(0, offset), min(len(self), offset + len(others))
            if a < b:
                column[a:b] = values[a - offset : b - offset]
            columns[name] = column
        count = self.quality.implausible_values + others.quality.implausible_values
        quality = replace(self.quality, implausible_values=count)
        return HourlySeries(self.start, columns, quality, self.source)

    def until(self, hours: int) -> HourlySeries:
        """The first `hours` hours."""
        columns = {name: x[:hours] for name, x in self.columns.items()}
        return HourlySeries(self.start, columns, self.quality, self.source)

    def resample(self, resolution: str) -> tuple[Array, dict[str, Array]]:
        """Means over UTC days or months that are complete; others are NaN.

        Args:
            resolution: "hourly", "daily" or "monthly".

        Returns:
            Starts of the periods, and the columns.
        """
        if resolution not in RESOLUTIONS:
            raise ValueError(f"resolution must be one of {list(RESOLUTIONS)}, got {resolution!r}.")
        periods = self.times.astype(f"datetime64[{RESOLUTIONS[resolution]}]")
        starts, inverse = np.unique(periods, return_inverse=True)
        ends = (starts + 1).astype("datetime64[h]")
        expected = ((ends - starts.astype("datetime64[h]")) / HOUR).astype(int)
        means = {}
        for name, values in self.columns.items():
            present = np.bincount(inverse, ~np.isnan(values), len(starts))
            sums = np.bincount(inverse, np.nan_to_num(values), len(starts))
            complete = present == expected
            means[name] = np.where(complete, sums / np.maximum(present, 1), np.nan)
        return starts, means

    def write_csv(
        self, path: Path, resolution: str = "hourly", *, local_zone: str | None = None
    ) -> None:
        """Write all or nothing: to a neighbour first, then under the name.

        Args:
            local_zone: an IANA name; a second column has the times by its clocks, with offset.

        Raises:
            ValueError: a spreadsheet would take the name of a column for a formula.
        """
        formulas = [name for name in self.columns if name.lstrip()[:1] in tuple("=+-@")]
        if formulas:
            raise ValueError(
                "names of columns must not begin with = + - or @, which spreadsheets run as "
                f"formulas, got {formulas}; rename them."
            )
        times, columns = self.resample(resolution)
        beside = path.with_name(path.name + ".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow([TIME, *([] if local_zone is None else ["time_local"]), *columns])
                for row, time in enumerate(times):
                    values = (column[row] for column in columns.values())
                    cells = ["" if np.isnan(v) else f"{v:.10g}" for v in values]
                    local = [] if local_zone is None else [_with_offset(time, local_zone)]
                    writer.writerow([time, *local, *cells])
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def _with_offset(time: np.datetime64, zone: str) -> str:
    """A UTC time by a zone's clocks: 2024-11-03T01:00-07:00."""
    utc = time.astype("datetime64[s]").astype(datetime).replace(tzinfo=timezone.utc)
    return str(utc.astimezone(ZoneInfo(zone)).isoformat(timespec="minutes"))


def _same(a: float, b: float) -> bool:
    return a == b or (np.isnan(a) and np.isnan(b))
