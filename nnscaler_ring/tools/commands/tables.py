"""Tables that fit: a narrow terminal loses columns, or lines for the columns, but never a value."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDE = 200
"""Characters of a line where the output is a file or a pipe: nothing has to be left out there."""

GAP = 2


@dataclass(frozen=True)
class Column:
    """One column; the unit belongs to its name. `importance` 0 stays, higher ones go first."""

    name: str
    importance: int = 0
    right: bool = True


def make_console() -> Console:
    """The screen's width, or COLUMNS; without either, room for every table."""
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDE
    return console


def print_table(
    console: Console, columns: Sequence[Column], rows: Sequence[Sequence[str]], *, more: str = ""
) -> None:
    """Print rows of markup; what does not fit is left out by importance, and named.

    Where the columns of importance 0 do not fit either, every row becomes a few lines.

    Args:
        more: where the columns that are left out can be found, for example "--json has them".
    """
    widths = [
        max([cell_len(column.name), *(cell_len(Text.from_markup(row[n]).plain) for row in rows)])
        for n, column in enumerate(columns)
    ]
    shown = list(range(len(columns)))

    def needed() -> int:
        return sum(widths[n] for n in shown) + GAP * (len(shown) - 1)

    while needed() > console.width:
        least = max(shown, key=lambda n: (columns[n].importance, n))
        if not columns[least].importance:
            break
        shown.remove(least)
    if needed() > console.width:
        _print_lines(console, columns, rows)
        return
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    for n in shown:
        justify = "right" if columns[n].right else "left"
        table.add_column(columns[n].name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(row[n] for n in shown))
    console.print(table)
    left_out = [column.name for n, column in enumerate(columns) if n not in shown]
    if left_out:
        told = f"; {more}" if more else ""
        console.print(f"[dim]Too narrow for: {', '.join(left_out)}{told}.[/]")


def _print_lines(
    console: Console, columns: Sequence[Column], rows: Sequence[Sequence[str]]
) -> None:
    """The first column as a heading, the others as a line each."""
    for row in rows:
        console.print(row[0], soft_wrap=True)
        for column, value in zip(columns[1:], row[1:], strict=True):
            if value:
                console.print(f"  {column.name}: {value}", soft_wrap=True)
