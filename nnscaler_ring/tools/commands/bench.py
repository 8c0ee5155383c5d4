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

from nnscaler_ring.simulator.planner import gigabytes
from nnscaler_ring.tools.calibrate import CASES, DTYPES, calibrate, compare
from nnscaler_ring.tools.commands.options import (
    Size,
    check_writable,
    json_option,
    rank_errors,
    usage_errors,
)
from nnscaler_ring.tools.commands.replay import replay
from nnscaler_ring.tools.commands.tables import Column, make_console, print_table
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
@json_option
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
    as_json: bool,
    commit: str | None,
) -> None:
    """Measure this machine; benchmarks/ has the benchmarks of the library on CPU ranks."""
    if wanted == (device is not None):
        raise click.UsageError("give either --calibrate or --device.")
    out = out or (CLUSTER_FILE if wanted else None)
    with usage_errors():
        check_writable(out)
        check_writable(report)
    if device is not None:
        with usage_errors():
            is_right = replay(device, tokens, ranks, reps, out, only, commit, as_json=as_json)
        sys.exit(not is_right)
    assert out is not None
    _calibrate(out, report, cases, as_json=as_json)


def _calibrate(out: Path, report: Path | None, cases: int, *, as_json: bool) -> None:
    load_before = os.getloadavg()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    chosen = CASES[:cases]
    screen = Console(stderr=as_json)
    with (
        rank_errors(),
        Progress(*columns, TimeElapsedColumn(), console=screen, transient=True) as progress,
    ):
        task = progress.add_task("measuring", total=len(DTYPES) + 1 + len(chosen))

        def advance(what: str) -> None:
            progress.update(task, advance=1, description=what)

        cluster = calibrate(advance)
        out.write_text(json.dumps(cluster.to_json(), indent=2) + "\n", encoding="utf-8")
        rows = compare(cluster, chosen, advance)
    record = {
        **origin(["nnscaler-ring", *sys.argv[1:]], "cpu"),
        "load_average_before": load_before,
        "load_average_after": os.getloadavg(),
        "cluster": cluster.to_json(),
        "rows": rows,
    }
    if report:
        report.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if as_json:
        click.echo(json.dumps(record, indent=2))
        return
    console = make_console()
    print_table(console, COLUMNS, [_row(row) for row in rows], more="--json has them")
    for path in (out, *([report] if report else [])):
        console.print(f"wrote {path}", markup=False)


COLUMNS = (
    Column("case", right=False),
    Column("step"),
    Column("predicted"),
    Column("off by", 1),
    Column("sent", 2),
    Column("memory", 3),
    Column("memory off by", 4),
)


def _row(row: dict[str, Any]) -> list[str]:
    exact = row["sent_bytes"] == row["predicted_sent_bytes"]
    return [
        row["case"],
        f"{row['measured_seconds']['step'] * 1e3:.0f} ms",
        f"{row['predicted_seconds']['step'] * 1e3:.0f} ms",
        f"{row['step_error']:+.0%}",
        "as predicted" if exact else "DIFFERS",
        gigabytes(row["counted_memory_bytes"]),
        f"{row['memory_error']:+.1%}",
    ]
