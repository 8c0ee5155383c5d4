"""The README's tables, from results/*.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SERIES = {"us48_2024": "US48, test 2024", "ciso_2020": "CISO, test 2019-07 to 2020-06"}


def markdown(folder: Path = RESULTS) -> str:
    """Skill and bands per series and horizon over all seeds, then the comparison of ranks."""
    return f"{skill_table(folder)}\n{coverage_table(folder)}\n{ranks_table(folder)}"


def skill_table(folder: Path = RESULTS) -> str:
    """One row per series and horizon; the interval is that of the worst seed."""
    lines = [
        "| series | horizon | skill of each seed | mean | 95 % of the worst | 1 - MAPE "
        "| best naive | its 1 - MAPE | document's target |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, title in SERIES.items():
        seeds = [_read(path) for path in sorted(folder.glob(f"{name}_seed*.json"))]
        for horizon in seeds[0]["horizons"] if seeds else ():
            scores = [seed["horizons"][horizon] for seed in seeds]
            skills = [score["skill"] for score in scores]
            worst = min(scores, key=lambda score: score["skill"])
            low, high = worst["skill_95_percent"]
            fit = sum(score["model"]["one_minus_mape"] for score in scores) / len(scores)
            naive = worst["naives"][worst["best_naive"]]["one_minus_mape"]
            lines.append(
                f"| {title} | {horizon} h | {', '.join(f'{x:+.3f}' for x in skills)} "
                f"| **{sum(skills) / len(skills):+.3f}** | {low:+.3f} to {high:+.3f} "
                f"| {fit:.2%} | {worst['best_naive']} | {naive:.2%} "
                f"| {worst['document_target_one_minus_mape']:.0%} |"
            )
    return "\n".join(lines) + "\n"


def coverage_table(folder: Path = RESULTS) -> str:
    """Test hours within the 90 % band, of each seed that has calibrated ones, and before."""
    lines = [
        "| series | horizon | seeds | 90 % band holds | before calibration |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, title in SERIES.items():
        seeds = [_read(path) for path in sorted(folder.glob(f"{name}_seed*.json"))]
        seeds = [seed for seed in seeds if "coverage_before_calibration" in seed["horizons"]["24"]]
        numbers = ", ".join(str(seed["config"]["seed"]) for seed in seeds)
        for horizon in seeds[0]["horizons"] if seeds else ():
            scores = [seed["horizons"][horizon] for seed in seeds]
            held, before = (
                ", ".join(f"{score[key]:.1%}" for score in scores)
                for key in ("coverage_of_90_percent_band", "coverage_before_calibration")
            )
            lines.append(f"| {title} | {horizon} h | {numbers} | {held} | {before} |")
    return "\n".join(lines) + "\n"


def ranks_table(folder: Path = RESULTS) -> str:
    """The same training on 1, 2 and 4 ranks, and the memory of the busiest rank."""
    path = folder / "ranks.json"
    if not path.exists():
        return ""
    found = _read(path)
    one = max(found["memory"]["by_ranks"][0]["peak_bytes"])
    lines = [
        "| ranks | losses differ, float32 | float64 | forecasts differ, MW "
        f"| peak memory at {found['memory']['context']:,} hours | of one rank |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for same, memory in zip(found["same"], found["memory"]["by_ranks"], strict=True):
        peak = max(memory["peak_bytes"])
        lines.append(
            f"| {same['ranks']} | {same['largest_relative_difference_of_a_loss']:.1e} "
            f"| {same['largest_relative_difference_in_float64']:.1e} "
            f"| {same['largest_difference_of_a_forecast']:.1g} | {peak / 2**20:.0f} MiB "
            f"| {peak / one:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data
