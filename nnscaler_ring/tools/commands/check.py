"""`nnscaler-ring check`: is attention exact on this machine?"""

from __future__ import annotations

import sys
import time

import click
import rich.box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from nnscaler_ring.tools.check import LIMITS, Case, all_cases, is_ok, kernel_for, run_cases
from nnscaler_ring.tools.commands.options import (
    device_option,
    rank_errors,
    ranks_option,
    usage_errors,
)
from nnscaler_ring.tools.launch import check_ranks


@click.command()
@ranks_option
@click.option("--quick", is_flag=True, help="Fewer masks and shorter sequences.")
@device_option
def check(ranks: int, quick: bool, device: str) -> None:
    """Compare every op over several ranks with dense float64 attention."""
    with usage_errors():
        check_ranks(ranks, device)
    cases = all_cases(ranks, quick=quick)
    console = Console()
    start = time.monotonic()
    with rank_errors(), _progress(console) as progress:
        task = progress.add_task(f"{len(cases)} calls over {ranks} ranks", total=len(cases))
        errors = run_cases(
            cases, ranks=ranks, device=device, on_case=lambda: progress.advance(task)
        )
    console.print(_table(errors))
    for dtype, limit in LIMITS.items():
        console.print(
            f"{_name(dtype)}: {limit.measure} at most {limit.largest:g}, "
            f"kernel {kernel_for(dtype, device)}",
            highlight=False,
        )
    wrong = sum(not is_ok(case, error) for case, error in errors.items())
    console.print(_verdict(len(cases), wrong, ranks, time.monotonic() - start), highlight=False)
    if wrong:
        sys.exit(1)


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True)


def _table(errors: dict[Case, float]) -> Table:
    """A row for each op, mask and exchange, a column of largest errors for each dtype."""
    names = (_name(dtype) for dtype in LIMITS)
    table = Table(
        "op", "exchange", "mask", *names, "ok", box=rich.box.SIMPLE, pad_edge=False, show_edge=False
    )
    by_row: dict[tuple[str, str, str], dict[Case, float]] = {}
    for case, error in errors.items():
        by_row.setdefault((case.op, case.exchange, case.mask), {})[case] = error
    for row, group in by_row.items():
        cells = [_cell(case, error) for case, error in group.items()]
        ok = all(is_ok(case, error) for case, error in group.items())
        table.add_row(*row, *cells, "[green]ok[/]" if ok else "[bold red]WRONG[/]")
    return table


def _cell(case: Case, error: float) -> str:
    return f"{error:.1e}" if is_ok(case, error) else f"[bold red]{error:.1e}[/]"


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _verdict(cases: int, wrong: int, ranks: int, seconds: float) -> str:
    if wrong:
        return f"[bold red]{wrong} of {cases} calls are off.[/]"
    over = "1 rank" if ranks == 1 else f"{ranks} ranks"
    return (
        f"[bold green]All {cases} calls over {over} equal dense attention: "
        f"out, softmax_lse, dq, dk, dv.[/] {seconds:.1f} s"
    )
