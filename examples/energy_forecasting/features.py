"""What the model reads: scaled history, a mask of what was observed, and the calendar.

A token is an hour. It carries the target's last week up to and including that hour, so that the
model need not learn to collect it, and says which part of it was observed. Nothing of a token comes
from a later hour, and the scaler is fitted on training hours alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timezone
from zoneinfo import ZoneInfo

import numpy as np
import torch
from torch import Tensor

from examples.energy_forecasting.config import DAY, WEEK, YEAR, Config
from examples.energy_forecasting.holiday import holiday_days
from examples.energy_forecasting.series import HOUR, HourlySeries

HARMONICS = 3
CALENDAR_WIDTH = 3 * 2 * HARMONICS + 7
"""Of the calendar without holidays."""

BASE_WIDTH = 6
"""Channels that the head gets beside the calendar of an hour: see `Features.ahead`."""


@dataclass(frozen=True)
class Scaler:
    """x -> (x - mean) / deviation."""

    mean: float
    deviation: float

    @classmethod
    def fit(cls, values: np.ndarray) -> Scaler:
        """From the observed values.

        Raises:
            ValueError: fewer than two, or all the same.
        """
        seen = values[~np.isnan(values)]
        if len(seen) < 2 or seen.std() == 0:
            raise ValueError(
                f"a series must vary to be scaled, got {len(seen)} observed values, all alike, in "
                "the training hours; choose another column, or a range that has values."
            )
        return cls(float(seen.mean()), float(seen.std()))

    def scale(self, values: np.ndarray) -> np.ndarray:
        """To about zero mean and unit deviation."""
        return (values - self.mean) / self.deviation

    def restore(self, values: np.ndarray) -> np.ndarray:
        """Back to the series' own unit."""
        return values * self.deviation + self.mean


def fill_forward(values: np.ndarray) -> np.ndarray:
    """Missing values replaced by the same hour of the day before, else by the last one seen.

    Causal: an hour is filled from earlier hours only. What nothing precedes becomes 0, the mean of
    a scaled series.
    """
    filled = values.copy()
    last = 0.0
    for n, value in enumerate(values):
        if np.isnan(value):
            filled[n] = filled[n - DAY] if n >= DAY else last
        last = filled[n]
    return filled


def calendar_width(config: Config) -> int:
    """Columns of `calendar`."""
    return CALENDAR_WIDTH + bool(config.holidays)


def local_times(times: np.ndarray, time_zone: str) -> np.ndarray:
    """UTC times by the clocks of a zone, datetime64[s]."""
    zone = ZoneInfo(time_zone)
    return np.array(
        [
            time.replace(tzinfo=timezone.utc).astimezone(zone).replace(tzinfo=None)
            for time in times.astype("datetime64[s]").astype(object)
        ],
        dtype="datetime64[s]",
    )


def calendar(start: np.datetime64, hours: int, time_zone: str, holidays: str = "") -> Tensor:
    """[hours, CALENDAR_WIDTH]: waves of the hour, the week and the year, and the weekday.

    By the clocks of `time_zone`, which people follow; the series itself stays in UTC. With
    `holidays`, a country such as "US", one more column: whether the day is a public holiday.
    """
    local = local_times(start + np.arange(hours) * HOUR, time_zone)
    days = local.astype("datetime64[D]")
    hour = (local - days) / HOUR  # half hours too, as in India
    weekday = (days.astype(int) + 3) % 7  # 1970-01-01 was a Thursday
    day_of_year = (days - days.astype("datetime64[Y]")).astype(int) + hour / DAY
    waves = []
    for value, period in ((hour, 24), (weekday * 24 + hour, 168), (day_of_year, 365.25)):
        for k in range(1, HARMONICS + 1):
            turn = 2 * math.pi * k * value / period
            waves += [np.sin(turn), np.cos(turn)]
    table = np.concatenate((np.stack(waves, 1), np.eye(7)[weekday]), axis=1)
    if holidays:
        table = np.c_[table, holiday_days(days, holidays)]
    return torch.tensor(table, dtype=torch.float32)


def fit_scalers(series: HourlySeries, train_stop: int) -> dict[str, Scaler]:
    """A scaler per column, from the hours before `train_stop`.

    Raises:
        ValueError: a column does not vary there.
    """
    scalers = {}
    for name, values in series.columns.items():
        try:
            scalers[name] = Scaler.fit(values[:train_stop])
        except ValueError as error:
            raise ValueError(f"column {name!r}: {error}") from None
    return scalers


def check_columns(series: HourlySeries, scalers: Mapping[str, object]) -> None:
    """Raises ValueError for other columns than those of the scalers."""
    if list(series.columns) != list(scalers):
        raise ValueError(
            f"the series must have the columns {list(scalers)}, as in training, got "
            f"{list(series.columns)}; name them with --target and --channel."
        )


class Features:
    """The features of one series; hours are counted from its start.

    Args:
        series: the first column is forecast, the others are channels.
        config: the run.
        scalers: of `fit_scalers`, as the model was trained with.

    Raises:
        ValueError: other columns than those of the scalers.
    """

    def __init__(self, series: HourlySeries, config: Config, scalers: Mapping[str, Scaler]) -> None:
        check_columns(series, scalers)
        self.config, self.start, self.series = config, series.start, series
        self.scaler = next(iter(scalers.values()))
        self.target = torch.tensor(self.scaler.scale(series.target), dtype=torch.float32)
        self.observed = ~torch.isnan(self.target)
        filled = fill_forward(self.target.numpy().astype(float))
        self.filled = torch.tensor(filled, dtype=torch.float32)
        self.channels = [
            torch.tensor(fill_forward(scalers[name].scale(values)), dtype=torch.float32)
            for name, values in list(series.columns.items())[1:]
        ]
        hours = len(series) + config.longest
        self.calendar = calendar(series.start, hours, config.time_zone, config.holidays)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.config.recent + 2 + DAY * len(self.channels) + self.calendar.shape[1]

    def tokens(self, hours: Tensor) -> Tensor:
        """[len(hours), width] of these hours; history before the series is 0."""
        observed = _history(self.observed.float(), hours, DAY)
        parts = [_history(self.filled, hours, self.config.recent)]
        parts += [observed[:, -1:], observed.mean(1, keepdim=True)]
        parts += [_history(channel, hours, DAY) for channel in self.channels]
        return torch.cat([*parts, self.calendar[hours]], dim=1)

    def ahead(self, origins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is known at an origin about the hours from it on.

        Args:
            origins: int64 [n], the first hour that is forecast; everything before it is known.

        Returns:
            base [n, longest]: the seasonal naive that the head corrects, the mean of the same hour
            of the last day and of the last week. known [n, longest, calendar_width + BASE_WIDTH].
            naives [n, longest, candidates]: see `naive_names`.
        """
        lead = torch.arange(self.config.longest)
        hours = origins.unsqueeze(1) + lead
        naives = self.naives(origins)
        base = naives[..., 2]
        parts = [naives[..., 0] - base, naives[..., 1] - base]
        if self.config.yearly:
            level = _level(self.filled, origins) - _level(self.filled, origins - YEAR)
            parts += [naives[..., 3] - base, naives[..., 3] + level.unsqueeze(1) - base]
        else:
            parts += [torch.zeros_like(base)] * 2
        parts += [(lead / self.config.longest).expand_as(base), base]
        known = torch.cat((self.calendar[hours], torch.stack(parts, dim=-1)), dim=-1)
        return base, known, naives

    def naives(self, origins: Tensor) -> Tensor:
        """[n, longest, 3 or 4] forecasts of `naive_names`, scaled."""
        lead = torch.arange(self.config.longest)
        day = self.filled[origins.unsqueeze(1) - DAY + lead % DAY]
        week = self.filled[origins.unsqueeze(1) - WEEK + lead % WEEK]
        found = [day, week, (day + week) / 2]
        if self.config.yearly:
            found.append(self.filled[origins.unsqueeze(1) - YEAR + lead])
        return torch.stack(found, dim=-1)

    def actual(self, origins: Tensor) -> Tensor:
        """[n, longest] what came, scaled; NaN where it is missing or not yet known."""
        hours = origins.unsqueeze(1) + torch.arange(self.config.longest)
        known = hours < len(self.target)
        found = self.target[hours.clamp(max=len(self.target) - 1)]
        return torch.where(known, found, torch.nan)


def _history(values: Tensor, hours: Tensor, length: int) -> Tensor:
    """[len(hours), length]: the values up to and including each hour, 0 before the start."""
    padded = torch.cat((values.new_zeros(length - 1), values))
    return padded.unfold(0, length, 1)[hours]


def _level(values: Tensor, origins: Tensor) -> Tensor:
    """Mean of the week before each origin."""
    return values[origins.unsqueeze(1) - 1 - torch.arange(WEEK)].mean(1)


def daily_lags(values: np.ndarray, origins: np.ndarray, lead: int) -> np.ndarray:
    """[origins, 6]: what is known at each origin for the hour `lead` after it.

    The same hour of the last day, of the last week and of the week before; the means of the last
    day, the last week and the last three hours.
    """
    means = [values[origins[:, None] - 1 - np.arange(length)].mean(1) for length in (DAY, WEEK, 3)]
    hours = (DAY - lead % DAY, WEEK - lead % WEEK, 2 * WEEK - lead % WEEK)
    return np.stack([*(values[origins - hour] for hour in hours), *means], axis=1)


def naive_names(config: Config) -> list[str]:
    """Names of the seasonal naives, in the order of `Features.naives`."""
    names = ["same hour of the last day", "same hour of the last week", "mean of both"]
    return names + ["52 weeks before"] * config.yearly
