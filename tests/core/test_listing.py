"""A program as lines that a reader follows from top to bottom."""

import pytest
from click.testing import CliRunner

from nnscaler_ring.core.exchange import EXCHANGES, Cut
from nnscaler_ring.core.exchange.listing import WIDTH, listing
from nnscaler_ring.tools.commands import commands
from tests.core.plan.test_schedule import dense_problem, random_problems


def test_a_small_program_is_this() -> None:
    """Rank 1 of 2, causal: it reads all that rank 0 has, and nobody reads what it has."""
    problem = dense_problem("contiguous", "contiguous", (3, 2), True, (-1, -1))
    program = EXCHANGES["direct"].program(problem.schedule, 1)
    assert [*listing(program, backward=True)] == [
        "rank 1 of 2, backward; place 0 holds its 2 rows",
        "  post 1   receive keys from 0 into place 1: rank 0, rows 0 to 3",
        "  compute  place 0: 1 tiles, 3 pairs",
        "  wait 1",
        "  compute  place 1: 1 tiles, 6 pairs",
        "  free     place 1",
        "  post 2   send gradients to 0: place 1, rows 0 to 3",
        "  wait 2",
    ]


@pytest.mark.parametrize("name", EXCHANGES)
def test_every_program_fits_the_page(name: str) -> None:
    for problem in random_problems(71, 40, longest=9):
        for rank in problem.ranks:
            program = EXCHANGES[name].program(problem.schedule, rank, Cut(4, 2))
            for backward in (False, True):
                head, *lines = listing(program, backward=backward)
                assert head.startswith(f"rank {rank} of ")
                assert len(lines) >= len([*program.actions(backward=backward)])
                assert all(len(line) <= WIDTH for line in lines), problem.what


def test_command_line_prints_the_program_of_a_rank() -> None:
    arguments = ["plan", "--tokens", "16384", "--ranks", "4", "--heads", "8", "--program", "1"]
    result = CliRunner().invoke(commands, [*arguments, "--exchange", "ring"])
    assert result.exit_code == 0, result.output
    assert "rank 1 of 4, forward" in result.stdout and "rank 1 of 4, backward" in result.stdout
    assert "send keys to 2: place 0, rows 0 to 4,096" in result.stdout
    assert CliRunner().invoke(commands, arguments).exit_code == 0


def test_command_line_prints_the_beginning_of_a_long_program() -> None:
    arguments = [
        "plan",
        "--tokens",
        "64M",
        "--ranks",
        "4",
        "--heads",
        "8",
        "--forward-only",
        "--program",
        "3",
    ]
    result = CliRunner().invoke(commands, [*arguments, "--exchange", "direct"])
    assert result.exit_code == 0, result.output
    assert result.stdout.rstrip().endswith("more lines")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--program 4", "program must be a rank, 0 to 3, got 4"),
        ("--exchange ring", "exchange and layout go with --program RANK"),
        ("--program 1 --json", "json goes with a plan, not with --program"),
    ],
)
def test_what_does_not_go_together_is_refused(options: str, message: str) -> None:
    arguments = ["plan", "--tokens", "16", "--ranks", "4", *options.split()]
    result = CliRunner().invoke(commands, arguments)
    assert result.exit_code == 2 and message in result.stderr
