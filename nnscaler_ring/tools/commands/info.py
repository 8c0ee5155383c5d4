"""`nnscaler-ring info`: what this machine offers."""

from __future__ import annotations

import json
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from nnscaler_ring import __version__
from nnscaler_ring.core.kernels.native.library import describe
from nnscaler_ring.tools.machine import cuda_versions, devices, kernel_table, package_versions


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
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
    console = Console()
    console.print(_facts_table(facts))
    console.print(_kernels_table(facts["kernels"]))
    for reason in _reasons(facts["kernels"]):
        console.print(reason, highlight=False)


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


def _kernels_table(rows: list[dict[str, Any]]) -> Table:
    """A column per problem."""
    table = Table(title="kernels, for 32 heads on 8 KV heads", title_justify="left")
    table.add_column("device, dtype, head_dim")
    for row in rows:
        table.add_column(f"{row['device']}\n{row['dtype']}\n{row['head_dim']}")
    for name in rows[0]["refusals"]:
        answers = (row["refusals"][name] for row in rows)
        table.add_row(name, *("[green]yes[/]" if reason is None else "no" for reason in answers))
    table.add_section()
    table.add_row('kernel="auto" takes', *(row["auto"] or "[red]none[/]" for row in rows))
    return table


def _reasons(rows: list[dict[str, Any]]) -> list[str]:
    """Each kernel's refusals, each reason once; and why auto passes over the kernels that could."""
    reasons = {
        f"no {name} on {row['device']}: {reason}"
        for row in rows
        for name, reason in row["refusals"].items()
        if reason is not None
    }
    orders = {", ".join(row["asked"]) for row in rows}
    auto = [f"auto asks {order}, and takes the first that can" for order in sorted(orders)]
    return [*sorted(reasons), *auto]
