"""Figures of an evaluation, as PNG bytes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.dates import ConciseDateFormatter
from matplotlib.figure import Figure

from examples.energy_forecasting.config import DAY, Config
from examples.energy_forecasting.evaluation import Forecasts, by_lead_day
from examples.energy_forecasting.features import local_times
from examples.energy_forecasting.series import HOUR

BLUE, ORANGE, GREY = "#0b7285", "#e8590c", "#868e96"
BANDS = ("#d3e8ec", "#8fc1cb")
"""From the widest band in; opaque, so that the legend shows what is drawn."""

INSTEAD = ("widest band, not 90 %", "inner band")
"""What bands are called that do not hold what they say."""


FEWEST_MONTHS = 4
WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


def png(figure: Figure) -> bytes:
    """The figure as a file's content."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def forecast_figure(
    origin: np.datetime64,
    quantiles: np.ndarray,
    config: Config,
    *,
    actual: np.ndarray | None = None,
    past: np.ndarray | None = None,
    holds: bool = True,
) -> Figure:
    """Bands of one forecast, with what came and the hours before.

    `holds`: whether the bands hold what they say; else they are not called by their shares.
    """
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots()
    zone = config.time_zone
    times = local_times(origin + np.arange(len(quantiles)) * HOUR, zone)
    middle = config.model.quantiles.index(0.5)
    for n in range(middle):
        low, high = config.model.quantiles[n], config.model.quantiles[-1 - n]
        axes.fill_between(
            times,
            quantiles[:, n] / 1e3,
            quantiles[:, -1 - n] / 1e3,
            color=BANDS[min(n, len(BANDS) - 1)],
            lw=0,
            label=f"{high - low:.0%} band" if holds else INSTEAD[min(n, len(INSTEAD) - 1)],
        )
    axes.plot(times, quantiles[:, middle] / 1e3, color=BLUE, lw=1.4, label="median")
    if past is not None:
        before = local_times(origin - np.arange(len(past), 0, -1) * HOUR, zone)
        axes.plot(before, past / 1e3, color=GREY, lw=1, label="known")
    if actual is not None:
        axes.plot(times, actual / 1e3, color=ORANGE, lw=1, label="what came")
    axes.axvline(times[0], color=GREY, lw=0.8, ls=":")
    axes.set(ylabel="GW", xlabel=f"time in {zone}", title=f"Forecast from {origin} UTC")
    axes.xaxis.set_major_formatter(ConciseDateFormatter(axes.xaxis.get_major_locator()))
    figure.legend(ncols=5, fontsize=8, frameon=False, loc="outside lower center")
    return figure


def error_figure(test: Forecasts, config: Config) -> Figure:
    """Error of the day-ahead forecast by hour of the day and by month."""
    middle = config.model.quantiles.index(0.5)
    size = np.abs(test.quantiles[:, :DAY, middle] - test.actual[:, :DAY]) / 1e3
    local = local_times((test.origins[:, None] + np.arange(DAY) * HOUR).ravel(), config.time_zone)
    hours = ((local - local.astype("datetime64[D]")) / HOUR).astype(int).reshape(size.shape)
    months = local.astype("datetime64[M]").reshape(size.shape)
    weekdays = ((local.astype("datetime64[D]").astype(int) + 3) % 7).reshape(size.shape)
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(range(DAY), [np.nanmean(size[hours == hour]) for hour in range(DAY)], color=BLUE)
    left.set(
        xlabel=f"hour of the day, {config.time_zone}",
        ylabel="MAE, GW",
        title="Day-ahead error by hour",
    )
    # Few months say nothing of the seasons; the days of the week always do.
    by_month = len(np.unique(months)) >= FEWEST_MONTHS
    groups = months if by_month else weekdays
    found = np.unique(groups)
    names = [f"{name.astype(object):%b}" if by_month else WEEKDAYS[int(name)] for name in found]
    means = [np.nanmean(size[groups == name]) for name in found]
    right.bar(range(len(names)), means, color=BLUE)
    right.set_xticks(range(len(names)), names)
    title = f"Day-ahead error by {'month' if by_month else 'day of the week'}"
    right.set(ylabel="MAE, GW", title=title)
    return figure


def skill_figure(scores: dict[str, Any], test: Forecasts, config: Config) -> Figure:
    """Skill with its interval per horizon, and the error for each day ahead."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    horizons = list(scores)
    values = np.array([scores[h]["skill"] for h in horizons])
    bounds = np.array([scores[h]["skill_95_percent"] for h in horizons])
    reach = np.abs(bounds - values[:, None]).T
    left.bar(range(len(horizons)), values, yerr=reach, color=BLUE, capsize=4)
    left.set_xticks(range(len(horizons)), [f"{h} h" for h in horizons])
    left.axhline(0, color=GREY, lw=0.8)
    left.set(ylabel="1 - MAE / MAE of the best naive", title="Skill")
    for name, errors_by_day in by_lead_day(test, config).items():
        is_model = name == "model"
        right.plot(
            range(1, len(errors_by_day) + 1),
            np.array(errors_by_day) / 1e3,
            label=name,
            color=BLUE if is_model else None,
            lw=2 if is_model else 1,
            ls="-" if is_model else "--",
        )
    right.set(xlabel="days ahead", ylabel="MAE, GW", title="Error by lead time", ylim=(0, None))
    right.legend(fontsize=8, frameon=False)
    return figure


def memory_figure(memory: dict[str, Any]) -> Figure:
    """Peak memory of the busiest rank against the number of ranks."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    counts = [entry["ranks"] for entry in memory["by_ranks"]]
    peaks = [max(entry["peak_bytes"]) / 2**20 for entry in memory["by_ranks"]]
    axes.plot(counts, peaks, "o-", color=BLUE, label="measured, busiest rank")
    axes.plot(counts, [peaks[0] / n for n in counts], "--", color=GREY, label="1 / ranks")
    axes.set(
        xlabel="ranks",
        ylabel="MiB",
        xticks=counts,
        ylim=(0, None),
        title=f"A training step over {memory['context']:,} hours",
    )
    axes.legend(frameon=False)
    return figure
