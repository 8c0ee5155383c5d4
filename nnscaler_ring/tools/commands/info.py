"""`nnscaler-ring info`: what this machine offers."""

from __future__ import annotations

import json
from typing import Any

import click
from rich.table import Table

from nnscaler_ring import __version__
from nnscaler_ring.core.kernels.native.library import describe
from nnscaler_ring.tools.commands.options import json_option
from nnscaler_ring.tools.commands.tables import Column, make_console, print_table
from nnscaler_ring.tools.machine import cuda_versions, devices, kernel_table, package_versions


@click.command()
@json_option
def info(as_json: bool) -> None:
    """Versions, devices, and which kernel computes what here."""
    facts: dict[str, Any] = {
        "nnscaler_ring": __version__,
        "versions": package_versions() | cuda_versions(),
        "devices": devices(),
        "cpu_tiles": describe(),
        "kernels": kernel_table(),
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    console = make_console()
    console.print(_facts_table(facts))
    console.print("\nkernels, for 32 heads on 8 KV heads")
    print_table(console, *_kernels(facts["kernels"]))
    for reason in _reasons(facts["kernels"]):
        console.print(reason, markup=False)


def _facts_table(facts: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None)
    table.add_row("nnscaler_ring", facts["nnscaler_ring"])
    for name, version in facts["versions"].items():
        table.add_row(name, version or "[dim]not installed[/]")
    machine = facts["devices"]
    table.add_row("platform", machine["platform"])
    table.add_row("cpus", f"{machine['cpus']} ({machine['torch_threads']} torch threads)")
    table.add_row("gpus", ", ".join(machine["gpus"]) or "none")
    table.add_row("kernel cpu_tiles", facts["cpu_tiles"])
    table.add_row("backends", ", ".join(machine["backends"]) or "none")
    return table


def _kernels(rows: list[dict[str, Any]]) -> tuple[list[Column], list[list[str]]]:
    """A column per problem."""
    columns = [Column("device, dtype, head_dim", right=False)]
    columns += [
        Column(f"{row['device']} {row['dtype']} {row['head_dim']}", right=False) for row in rows
    ]
    table = [
        [name, *("[green]yes[/]" if row["refusals"][name] is None else "no" for row in rows)]
        for name in rows[0]["refusals"]
    ]
    table.append(['kernel="auto" takes', *(row["auto"] or "[red]none[/]" for row in rows)])
    return columns, table


def _reasons(rows: list[dict[str, Any]]) -> list[str]:
    """Every reason once, with the kernels that have it; and in which order auto asks."""
    devices: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row["refusals"].items():
            names = (
                devices.setdefault((row["device"], reason), []) if reason is not None else [name]
            )
            if name not in names:
                names.append(name)
    reasons = [
        f"no {', '.join(names)} on {device}: {reason}"
        for (device, reason), names in devices.items()
    ]
    orders = {", ".join(row["asked"]) for row in rows}
    auto = [f"auto asks {order}, and takes the first that can" for order in sorted(orders)]
    return [*sorted(reasons), *auto]
