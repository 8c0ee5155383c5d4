"""The commands of `nnscaler-ring`. A new one is one file and one entry in COMMANDS."""

from __future__ import annotations

import click

from nnscaler_ring import __version__
from nnscaler_ring.tools.commands import bench, build_kernel, check, demo, info, plan, simulate

COMMANDS: tuple[click.Command, ...] = (
    info.info,
    check.check,
    demo.demo,
    plan.plan_command,
    simulate.simulate,
    bench.bench,
    build_kernel.build_kernel,
)


class Commands(click.Group):
    """Shows the first sentence of every command whole, over as many lines as it takes."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The section of commands."""
        rows = [
            (name, command.get_short_help_str(limit=500)) for name, command in self.commands.items()
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(
    cls=Commands,
    commands={command.name or "": command for command in COMMANDS},
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__)
def commands() -> None:
    """Exact attention over sequences too long for one device."""
