"""`nnscaler-ring check`: is attention exact on this machine?"""

from __future__ import annotations

import json
import math
import sys
import time
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nnscaler_ring.simulator.planner import counted
from nnscaler_ring.tools.check import LIMITS, Case, all_cases, is_ok, kernel_for, run_cases
from nnscaler_ring.tools.commands.options import (
    device_option,
    json_option,
    rank_errors,
    ranks_option,
    usage_errors,
)
from nnscaler_ring.tools.commands.tables import Column, make_console, print_table
from nnscaler_ring.tools.launch import check_ranks


@click.command()
@ranks_option
@click.option("--quick", is_flag=True, help="Fewer masks and shorter sequences.")
@device_option
@json_option
def check(ranks: int, quick: bool, device: str, as_json: bool) -> None:
    """Compare every op over several ranks with dense float64 attention."""
    with usage_errors():
        check_ranks(ranks, device)
    cases = all_cases(ranks, quick=quick)
    start = time.monotonic()
    with rank_errors(), _progress(Console(stderr=as_json)) as progress:
        task = progress.add_task(
            f"{len(cases)} calls over {counted(ranks, 'rank')}", total=len(cases)
        )
        errors = run_cases(
            cases, ranks=ranks, device=device, on_case=lambda: progress.advance(task)
        )
    seconds = time.monotonic() - start
    wrong = sum(not is_ok(case, error) for case, error in errors.items())
    if as_json:
        click.echo(json.dumps(_facts(errors, ranks, device, seconds), indent=2, allow_nan=False))
    else:
        _show(errors, ranks, device, wrong, seconds)
    if wrong:
        sys.exit(1)


def _facts(errors: dict[Case, float], ranks: int, device: str, seconds: float) -> dict[str, Any]:
    """Everything as plain values; an error that is not finite is null."""
    return {
        "is_exact": all(is_ok(case, error) for case, error in errors.items()),
        "ranks": ranks,
        "device": device,
        "seconds": round(seconds, 1),
        "limits": {
            _name(dtype): {
                "measure": limit.measure,
                "largest": limit.largest,
                "kernel": kernel_for(dtype, device),
            }
            for dtype, limit in LIMITS.items()
        },
        "calls": [
            {
                "op": case.op,
                "exchange": case.exchange,
                "mask": case.mask,
                "dtype": _name(case.dtype),
                "tokens": case.tokens,
                "error": error if math.isfinite(error) else None,
                "is_ok": is_ok(case, error),
            }
            for case, error in errors.items()
        ],
    }


def _show(errors: dict[Case, float], ranks: int, device: str, wrong: int, seconds: float) -> None:
    """The verdict first, then the errors."""
    console = make_console()
    console.print(_verdict(len(errors), wrong, ranks, seconds))
    columns = [Column(name, right=False) for name in ("op", "exchange", "mask")]
    columns += [Column(_name(dtype), 1) for dtype in LIMITS]
    print_table(
        console, [*columns, Column("ok", right=False)], _rows(errors), more="--json has them"
    )
    for dtype, limit in LIMITS.items():
        console.print(
            f"{_name(dtype)}: {limit.measure} at most {limit.largest:g}, "
            f"kernel {kernel_for(dtype, device)}"
        )


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True)


def _rows(errors: dict[Case, float]) -> list[list[str]]:
    """A row for each op, mask and exchange, a column of largest errors for each dtype."""
    by_row: dict[tuple[str, str, str], dict[Case, float]] = {}
    for case, error in errors.items():
        by_row.setdefault((case.op, case.exchange, case.mask), {})[case] = error
    rows = []
    for row, group in by_row.items():
        cells = [_cell(case, error) for case, error in group.items()]
        ok = all(is_ok(case, error) for case, error in group.items())
        rows.append([*row, *cells, "[green]ok[/]" if ok else "[bold red]WRONG[/]"])
    return rows


def _cell(case: Case, error: float) -> str:
    return f"{error:.1e}" if is_ok(case, error) else f"[bold red]{error:.1e}[/]"


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _verdict(cases: int, wrong: int, ranks: int, seconds: float) -> str:
    if wrong:
        return f"[bold red]{wrong} of {cases} calls are off.[/]"
    over = counted(ranks, "rank")
    return (
        f"[bold green]All {cases} calls over {over} equal dense attention: "
        f"out, softmax_lse, dq, dk, dv.[/] {seconds:.1f} s"
    )
