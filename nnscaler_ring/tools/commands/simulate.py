"""`nnscaler-ring simulate`: run many ranks in one process, and report what was seen."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nnscaler_ring.core.exchange import EXCHANGES
from nnscaler_ring.core.op.checks import check_window
from nnscaler_ring.core.plan.layout import LAYOUTS
from nnscaler_ring.core.sizes import Sizes, dtype_name
from nnscaler_ring.simulator.call import SimulatedCall
from nnscaler_ring.simulator.cluster import load_cluster
from nnscaler_ring.simulator.report import markdown
from nnscaler_ring.simulator.simulation import Simulation, run_simulation, write_pictures
from nnscaler_ring.tools.commands.options import (
    SEED,
    Size,
    check_writable,
    device_option,
    json_option,
    usage_errors,
)
from nnscaler_ring.tools.commands.plan import parse_mask
from nnscaler_ring.tools.commands.tables import make_console
from nnscaler_ring.tools.machine import check_device

LARGEST_RING = 8
"""Memory is measured for ring sizes 1, 2, 4, ... up to the ranks, at most this."""


@click.command()
@click.option("--tokens", default=16384, show_default=True, type=Size())
@click.option("--ranks", default=4, show_default=True, type=Size())
@click.option("--heads", default=4, show_default=True, type=Size())
@click.option("--kv-heads", type=Size(), help="Default: as many as heads.")
@click.option("--head-dim", default=32, show_default=True, type=Size())
@click.option("--batch", default=1, show_default=True, type=Size())
@click.option("--dtype", default="fp32", show_default=True, help="fp64, fp32, bf16 or fp16.")
@click.option("--layout", default="zigzag", show_default=True, type=click.Choice([*LAYOUTS]))
@click.option("--exchange", default="direct", show_default=True, type=click.Choice([*EXCHANGES]))
@click.option(
    "--mask",
    default="causal",
    show_default=True,
    help="causal, full, or causal:LEFT or LEFT:RIGHT, windows in tokens.",
)
@click.option("--forward-only", is_flag=True)
@click.option("--share", type=int, help="Run this rank alone, with only its share in memory.")
@click.option(
    "--cluster",
    default="h200",
    show_default=True,
    help="Whose timeline is predicted: h200, h100, a100, cpu, or a cluster's JSON file.",
)
@device_option
@click.option("--seed", default=0, show_default=True, type=SEED)
@click.option(
    "--out",
    default=Path("simulation"),
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
)
@json_option
def simulate(
    tokens: int,
    ranks: int,
    heads: int,
    kv_heads: int | None,
    head_dim: int,
    batch: int,
    dtype: str,
    layout: str,
    exchange: str,
    mask: str,
    forward_only: bool,
    share: int | None,
    cluster: str,
    device: str,
    seed: int,
    out: Path,
    as_json: bool,
) -> None:
    """Run every rank of an attention call in this process, and write a report with pictures."""
    if importlib.util.find_spec("matplotlib") is None:
        raise click.UsageError("simulate needs matplotlib: pip install 'nnscaler_ring[demo]'")
    with usage_errors():
        check_device(device)
        kv = heads if kv_heads is None else kv_heads
        sizes = Sizes(heads, kv, head_dim, head_dim, dtype_name(dtype), batch)
        call = SimulatedCall(
            tokens, ranks, sizes, check_window(*parse_mask(mask)), layout, exchange=exchange
        )
        if share is not None and not 0 <= share < ranks:
            raise ValueError(f"share must be a rank from 0 to {ranks - 1}, got {share}.")
        rings = tuple(2**n for n in range(4) if 2**n <= min(ranks, tokens, LARGEST_RING))
        simulation = Simulation(
            call, load_cluster(cluster), not forward_only, share, device, rings, seed
        )
        check_writable(out / "simulation.json")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    screen = Console(stderr=as_json)
    with Progress(*columns, TimeElapsedColumn(), console=screen, transient=True) as progress:
        task = progress.add_task("simulating", total=simulation.steps())
        record = run_simulation(
            simulation, lambda what: progress.update(task, advance=1, description=what)
        )
    pictures = write_pictures(simulation, record, out)
    command = shlex.join(["nnscaler-ring", *sys.argv[1:]])
    report = markdown(record, pictures, command)
    (out / "simulation.md").write_text(report, encoding="utf-8")
    text = json.dumps({"command": command, **record}, indent=2)
    (out / "simulation.json").write_text(text + "\n", encoding="utf-8")
    if as_json:
        click.echo(text)
    else:
        _show(record, [out / "simulation.md", out / "simulation.json", *pictures])
    if not record["is_exact"]:
        sys.exit(1)


def _show(record: dict[str, Any], written: list[Path]) -> None:
    """The verdict first, then where the report is."""
    console = make_console()
    error = f"{record['sampled_rows']} sampled rows within {record['largest_error']:.1e} of float64"
    if record["is_exact"]:
        console.print(f"{record['simulated']}: {error}.", style="bold green", markup=False)
    else:
        console.print(f"WRONG: {error}", style="bold red", markup=False)
    for path in written:
        console.print(f"wrote {path}", markup=False)
