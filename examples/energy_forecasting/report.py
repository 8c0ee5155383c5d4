"""One self-contained HTML page of an evaluation."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator
from typing import Any

import numpy as np

from examples.energy_forecasting.config import Config
from examples.energy_forecasting.evaluation import Forecasts
from examples.energy_forecasting.features import local_times
from examples.energy_forecasting.plots import error_figure, forecast_figure, png, skill_figure
from examples.energy_forecasting.scores_table import verdict

STYLE = """
:root { color-scheme: light dark; --ink: #212529; --paper: #fff; --soft: #495057; --line: #868e96 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dee2e6; --paper: #16191c; --soft: #adb5bd }
  img { background: #fff; border-radius: 4px }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 0 auto; padding: 1em;
  color: var(--ink); background: var(--paper) }
.wide { overflow-x: auto }
table { border-collapse: collapse; margin: 1em 0 }
td, th { padding: .25em .8em; text-align: right; white-space: nowrap }
th { border-bottom: 1px solid var(--line) } td:first-child, th:first-child { text-align: left }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top }
img { max-width: 100%; height: auto } .note { color: var(--soft) }
"""
SHOWN_ANOMALIES = 15


def write_html(
    results: dict[str, Any], test: Forecasts, found: list[dict[str, Any]], config: Config
) -> str:
    """The page as text."""
    middle = len(test.origins) // 2
    figures = [
        skill_figure(results["horizons"], test, config),
        error_figure(test, config),
        *(
            forecast_figure(
                test.origins[n],
                test.quantiles[n, :168],
                config,
                actual=test.actual[n, :168],
                holds=all(score["band_holds_90_percent"] for score in results["horizons"].values()),
            )
            for n in (0, middle)
        ),
    ]
    images = "".join(f'<img alt="" src="data:image/png;base64,{_base64(png(f))}">' for f in figures)
    scores = results["horizons"]
    body = [
        f"<h1>Forecasts of {html.escape(results['series'])}</h1>",
        f"<p>{len(test.origins)} daily origins from {test.origins[0]} to {test.origins[-1]} UTC, "
        f"each with at least {config.context} hours of context. Figures have the clocks of "
        f"{html.escape(config.time_zone)}.</p>",
        "<h2>What was found</h2>",
        "<ul>",
        *(
            f"<li>{html.escape(' '.join(line.strip() for line in verdict(h, s)))}"
            for h, s in scores.items()
        ),
        "</ul>",
        *(f"<h3>{h} h</h3>{_table(HEAD, _rows(s))}" for h, s in scores.items()),
        "<p class=note>Skill is 1 - MAE / MAE of the seasonal naive that was best on the "
        "validation; the interval resamples weeks. Bands follow the days before each forecast "
        "(adaptive conformal inference); a band is called one of 90 % where it holds 85 to 95 % "
        "of the hours.</p>",
        images,
        "<h2>Anomalies</h2>",
        *_anomalies(results, found, config),
        "<h2>Where this comes from</h2>",
        _facts(results["provenance"]),
    ]
    title = f"<title>Forecasts of {html.escape(results['series'])}</title>"
    head = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
    )
    return f"{head}{title}<style>{STYLE}</style>{''.join(body)}\n"


HEAD = ["forecast", "MAE, MW", "RMSE, MW", "WAPE", "1 - MAPE", "model is better by"]


def _rows(score: dict[str, Any]) -> list[list[str]]:
    """The model and everything that it was compared with, the best first."""
    own = score["model"]["mae"]
    every = {"model": score["model"], **score["naives"], **score["baselines"]}
    return [
        [
            name,
            f"{found['mae']:,.0f}",
            f"{found['rmse']:,.0f}",
            f"{found['wape']:.2%}",
            f"{found['one_minus_mape']:.2%}",
            "" if name == "model" else f"{1 - own / found['mae']:+.1%}",
        ]
        for name, found in sorted(every.items(), key=lambda item: item[1]["mae"])
    ]


def _anomalies(results: dict[str, Any], found: list[dict[str, Any]], config: Config) -> list[str]:
    """The worst hours, or why none is named."""
    if results["anomalies_withheld"]:
        return [
            f"<p>No hour is called anomalous: {html.escape(results['anomalies_withheld'])}.</p>"
        ]
    hours = np.array([a["hour"] for a in found[:SHOWN_ANOMALIES]], dtype="datetime64[h]")
    local = [str(time)[:16].replace("T", " ") for time in local_times(hours, config.time_zone)]
    return [
        f"<p>{len(found)} hours whose distance from the day-ahead median exceeds what one in a "
        "thousand validation hours did, in half widths of the 90 % band.</p>",
        _table(
            [f"hour ({config.time_zone})", "actual, MW", "forecast, MW", "surprise"],
            [
                [time, f"{a['actual']:,.0f}", f"{a['forecast']:,.0f}", f"{a['surprise']:.1f}"]
                for time, a in zip(local, found, strict=False)
            ],
        ),
    ]


def _facts(facts: dict[str, Any]) -> str:
    """Nested plain values as a table of two columns."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td>{html.escape(str(value))}" for name, value in _flat(facts)
    )
    return f"<table class=facts>{rows}</table>"


def _flat(facts: dict[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{within}{name}: ")
        elif value is not None:
            yield f"{within}{name.replace('_', ' ')}", value


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(x)}" for x in row) for row in rows)
    names = "".join(f"<th>{html.escape(x)}" for x in head)
    return f"<div class=wide><table><tr>{names}{lines}</table></div>"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
