"""Markdown of a calibration's report: predictions beside runs.

nnscaler-ring bench --calibrate --report benchmarks/results/calibration.json
python benchmarks/predicted.py benchmarks/results/calibration.json
"""

import json
import sys
from pathlib import Path
from typing import Any

WITHIN = 0.25  # of the measured step: what the planner promises on a quiet machine


def table(record: dict[str, Any]) -> str:
    """The whole page."""
    rows = record["rows"]
    good = sum(abs(row["step_error"]) <= WITHIN for row in rows)
    exact = sum(row["sent_bytes"] == row["predicted_sent_bytes"] for row in rows)
    memory = sum(abs(row["memory_error"]) <= 0.05 for row in rows)
    lines = [
        "# Predictions beside runs, two CPU ranks",
        "",
        f"`{record['command']}`, {record['date']}, {record['device']}, torch "
        f"{record['versions']['torch']}. "
        f"{record['cluster']['source']}",
        "",
        f"Step time within {WITHIN:.0%} in {good} of {len(rows)} cases; bytes exact in {exact}; "
        f"peak memory within 5 % in {memory}.",
        "",
        "| case | forward, ms | predicted | backward, ms | predicted | step | bytes | memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for row in rows:
        measured, predicted = row["measured_seconds"], row["predicted_seconds"]
        times = (
            f"{1e3 * some[name]:.0f}"
            for name in ("forward", "backward")
            for some in (measured, predicted)
        )
        sent = "exact" if row["sent_bytes"] == row["predicted_sent_bytes"] else "DIFFER"
        lines.append(
            f"| {row['case']} | {' | '.join(times)} | {row['step_error']:+.0%} | {sent} | "
            f"{row['memory_error']:+.1%} |"
        )
    lines += [
        "",
        f"Load average (1, 5, 15 minutes) before: {_loads(record['load_average_before'])}; after: "
        f"{_loads(record['load_average_after'])}. Rates are measured with two ranks side by side: "
        "where one works alone (contiguous causal) it has more of the machine, so that the "
        "prediction is too long.",
        "",
        "The profiler misses deallocations by gloo's threads after a collective (all_gather), so "
        "that what it counts there is too high.",
        "",
    ]
    return "\n".join(lines)


def _loads(figures: list[float]) -> str:
    return ", ".join(f"{n:.1f}" for n in figures)


def main() -> None:
    path = Path(sys.argv[1])
    text = table(json.loads(path.read_text(encoding="utf-8")))
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
