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


@click.group(commands={command.name or "": command for command in COMMANDS})
@click.version_option(__version__)
def commands() -> None:
    """Exact attention over sequences too long for one device."""
