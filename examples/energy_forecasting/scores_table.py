"""The scores of an evaluation on the screen: what they say first, then every forecast."""

from __future__ import annotations

from typing import Any

from nnscaler_ring.tools.commands.tables import Column, make_console, print_table

SCORE_COLUMNS = (
    Column("horizon", right=False),
    Column("forecast", right=False),
    Column("MAE, MW"),
    Column("1 - MAPE", 2),
    Column("model is better by", 1),
)


def show_scores(scores: dict[str, Any]) -> None:
    """The verdicts, then every forecast beside the model's."""
    screen = make_console()
    rows = []
    for horizon, found in scores.items():
        for line in verdict(horizon, found):
            screen.print(line, markup=False)
        own = found["model"]["mae"]
        others = {**found["naives"], **found["baselines"]}
        by_error = sorted({"model": found["model"], **others}.items(), key=lambda x: x[1]["mae"])
        for name, errors in by_error:
            rows.append(
                [
                    f"{horizon} h",
                    f"[bold]{name}[/]" if name == "model" else name,
                    f"{errors['mae']:,.0f}",
                    f"{errors['one_minus_mape']:.2%}",
                    "" if name == "model" else f"{1 - own / errors['mae']:+.1%}",
                ]
            )
    screen.print()
    print_table(screen, SCORE_COLUMNS, rows, more="results.json has them")


def verdict(horizon: str, found: dict[str, Any]) -> list[str]:
    """What a horizon's scores say: against the best naive, against all, and of the bands."""
    low, high = found["skill_95_percent"]
    own = found["model"]["mae"]
    others = {**found["naives"], **found["baselines"]}
    losses = [f"{name} (by {own / others[name]['mae'] - 1:.1%})" for name in found["loses_to"]]
    held = found["coverage_of_90_percent_band"]
    return [
        f"{horizon} h: skill {found['skill']:+.3f} ({low:+.3f} to {high:+.3f}) over "
        f"{found['best_naive']!r}, the naive that was best on the validation.",
        f"  The model loses to {', '.join(losses)}."
        if losses
        else "  No forecast that was compared is better.",
        f"  The 90 % band holds {held:.1%} of the hours."
        if found["band_holds_90_percent"]
        else f"  The band is NOT one of 90 %: it holds {held:.1%} of the hours.",
    ]
