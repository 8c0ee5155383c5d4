"""Tables on narrow terminals: columns go, values never."""

import io

import pytest
from rich.console import Console

from nnscaler_ring.tools.commands.tables import WIDE, Column, make_console, print_table

COLUMNS = (
    Column("layout", right=False),
    Column("memory per rank"),
    Column("hidden", 2),
    Column("busiest", 1),
)
ROWS = [["contiguous", "14.4 GB", "[green]98%[/]", "1.75"], ["zigzag", "999 MB", "7%", "1.00"]]


def printed(width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    print_table(console, COLUMNS, ROWS, more="--json has them")
    return console.file.getvalue().splitlines()


def test_wide_enough():
    assert [line.split() for line in printed(80)] == [
        ["layout", "memory", "per", "rank", "hidden", "busiest"],
        ["contiguous", "14.4", "GB", "98%", "1.75"],
        ["zigzag", "999", "MB", "7%", "1.00"],
    ]


def test_the_least_important_column_goes_first():
    assert "Too narrow for: hidden; --json has them." in " ".join(printed(40))
    assert "Too narrow for: hidden, busiest; --json has them." in " ".join(printed(32))


@pytest.mark.parametrize("width", range(10, 60))
def test_no_value_is_cut(width):
    text = " ".join(" ".join(printed(width)).split())
    for row in ROWS:
        assert all(value in text for value in row[:2])
    assert "\u2026" not in text


def test_lines_where_no_column_may_go():
    assert printed(20)[:3] == ["contiguous", "  memory per rank: 14.4 GB", "  hidden: 98%"]


def test_a_pipe_has_room(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert make_console().width == WIDE
    monkeypatch.setenv("COLUMNS", "60")
    assert make_console().width == 60
