"""One self-contained HTML page of an evaluation."""

from __future__ import annotations

import base64
import html
from typing import Any

from examples.energy_forecasting.config import Config
from examples.energy_forecasting.evaluation import Forecasts
from examples.energy_forecasting.plots import error_figure, forecast_figure, png, skill_figure

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; color: #212529 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .25em .8em; text-align: right }
th { border-bottom: 1px solid #868e96 } td:first-child, th:first-child { text-align: left }
img { max-width: 100% } .note { color: #495057 }
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
                test.origins[n], test.quantiles[n, :168], config, actual=test.actual[n, :168]
            )
            for n in (0, middle)
        ),
    ]
    images = "".join(f'<img src="data:image/png;base64,{_base64(png(f))}">' for f in figures)
    body = [
        f"<h1>{html.escape(results['series'])}</h1>",
        f"<p>{len(test.origins)} daily origins from {test.origins[0]} to {test.origins[-1]} UTC, "
        f"each with at least {config.context} hours of context.</p>",
        "<h2>Skill</h2>",
        _table(
            [
                "horizon",
                "skill",
                "95 %",
                "MAE, MW",
                "WAPE",
                "1 - MAPE",
                "best naive",
                "its 1 - MAPE",
                "90 % band holds",
            ],
            [_score_row(h, s) for h, s in results["horizons"].items()],
        ),
        "<p class=note>Skill is 1 - MAE / MAE of the seasonal naive that was best on the "
        "validation; the interval resamples weeks. A naive's own 1 - MAPE already passes targets "
        "of 90, 80 and 70 %, so they say nothing.</p>",
        images,
        "<h2>Anomalies</h2>",
        f"<p>{len(found)} hours whose distance from the day-ahead median exceeds what one in a "
        "thousand validation hours did, in half widths of the 90 % band.</p>",
        _table(
            ["hour (UTC)", "actual, MW", "forecast, MW", "surprise"],
            [
                [a["hour"], f"{a['actual']:.0f}", f"{a['forecast']:.0f}", f"{a['surprise']:.1f}"]
                for a in found[:SHOWN_ANOMALIES]
            ],
        ),
        f"<p class=note>{html.escape(str(results['provenance']))}</p>",
    ]
    title = f"<title>{html.escape(results['series'])}</title>"
    return f"<!doctype html><meta charset=utf-8>{title}<style>{STYLE}</style>{''.join(body)}\n"


def _score_row(horizon: str, score: dict[str, Any]) -> list[str]:
    low, high = score["skill_95_percent"]
    naive = score["naives"][score["best_naive"]]
    return [
        f"{horizon} h",
        f"{score['skill']:+.3f}",
        f"{low:+.3f} to {high:+.3f}",
        f"{score['model']['mae']:.0f}",
        f"{score['model']['wape']:.2%}",
        f"{score['model']['one_minus_mape']:.2%}",
        score["best_naive"],
        f"{naive['one_minus_mape']:.2%}",
        f"{score['coverage_of_90_percent_band']:.1%}",
    ]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(x)}" for x in row) for row in rows)
    return f"<table><tr>{''.join(f'<th>{html.escape(x)}' for x in head)}{lines}</table>"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
