"""`nnscaler-ring bench`: what this machine does, for predictions and against one device."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from nnscaler_ring.simulator.planner import gigabytes
from nnscaler_ring.tools.calibrate import CASES, DTYPES, calibrate, compare
from nnscaler_ring.tools.commands.options import Size, check_writable, rank_errors, usage_errors
from nnscaler_ring.tools.commands.replay import replay
from nnscaler_ring.tools.launch import BACKENDS
from nnscaler_ring.tools.machine import origin

CLUSTER_FILE = Path("this_machine.json")


@click.command()
@click.option(
    "--calibrate",
    "wanted",
    is_flag=True,
    help="Measure kernels and messages of two CPU ranks, and compare predictions with runs.",
)
@click.option(
    "--device",
    type=click.Choice(list(BACKENDS)),
    help="Replay the ranks' schedules on one device of this type: kernels and merges, no messages.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="--calibrate: the cluster's file, for plan --device and simulate --cluster "
    f"[{CLUSTER_FILE}]. --device: rows are appended to it as JSON lines.",
)
@click.option(
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A JSON file for predictions beside measurements.",
)
@click.option("--cases", default=len(CASES), type=click.IntRange(1), help="Compare only so many.")
@click.option(
    "--tokens",
    multiple=True,
    type=Size(256),
    help="--device: lengths to replay, may be repeated [65536, 131072, 524288; on the CPU less].",
)
@click.option("--ranks", default=8, show_default=True, type=click.IntRange(2), help="--device.")
@click.option("--reps", default=5, show_default=True, type=click.IntRange(1), help="--device.")
@click.option(
    "--only",
    multiple=True,
    help="--device: cases with this text in their label, as printed; may be repeated.",
)
@click.option("--commit", help="--device: of the source, for the rows, where there is no git.")
def bench(
    wanted: bool,
    device: str | None,
    out: Path | None,
    report: Path | None,
    cases: int,
    tokens: tuple[int, ...],
    ranks: int,
    reps: int,
    only: tuple[str, ...],
    commit: str | None,
) -> None:
    """Measure this machine; benchmarks/ has the benchmarks of the library on CPU ranks."""
    if wanted == (device is not None):
        raise click.UsageError("give either --calibrate or --device.")
    console = Console()
    out = out or (CLUSTER_FILE if wanted else None)
    with usage_errors():
        check_writable(out)
        check_writable(report)
    if device is not None:
        with usage_errors():
            is_right = replay(console, device, tokens, ranks, reps, out, only, commit)
        sys.exit(not is_right)
    assert out is not None
    _calibrate(console, out, report, cases)


def _calibrate(console: Console, out: Path, report: Path | None, cases: int) -> None:
    load_before = os.getloadavg()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    chosen = CASES[:cases]
    with (
        rank_errors(),
        Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress,
    ):
        task = progress.add_task("measuring", total=len(DTYPES) + 1 + len(chosen))

        def advance(what: str) -> None:
            progress.update(task, advance=1, description=what)

        cluster = calibrate(advance)
        out.write_text(json.dumps(cluster.to_json(), indent=2) + "\n", encoding="utf-8")
        rows = compare(cluster, chosen, advance)
    console.print(_table(rows))
    console.print(f"wrote {out}", highlight=False, markup=False)
    if report:
        record = {
            **origin(["nnscaler-ring", *sys.argv[1:]], "cpu"),
            "load_average_before": load_before,
            "load_average_after": os.getloadavg(),
            "cluster": cluster.to_json(),
            "rows": rows,
        }
        report.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        console.print(f"wrote {report}", highlight=False, markup=False)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("case", box=None, pad_edge=False)
    for name in ("step", "predicted", "error", "sent", "memory", "error"):
        table.add_column(name, justify="right")
    for row in rows:
        exact = row["sent_bytes"] == row["predicted_sent_bytes"]
        table.add_row(
            row["case"],
            f"{row['measured_seconds']['step'] * 1e3:.0f} ms",
            f"{row['predicted_seconds']['step'] * 1e3:.0f} ms",
            f"{row['step_error']:+.0%}",
            "as predicted" if exact else "DIFFERS",
            gigabytes(row["counted_memory_bytes"]),
            f"{row['memory_error']:+.1%}",
        )
    return table
