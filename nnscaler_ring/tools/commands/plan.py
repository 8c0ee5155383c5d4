"""`nnscaler-ring plan`: what a run would take, before it is rented."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import islice
from typing import Any

import click
from rich.markup import escape

from nnscaler_ring.core.exchange import EXCHANGES, Program
from nnscaler_ring.core.exchange.listing import listing
from nnscaler_ring.core.op.checks import check_window
from nnscaler_ring.core.plan.layout import LAYOUTS
from nnscaler_ring.core.sizes import Sizes, dtype_name
from nnscaler_ring.simulator.cluster import Cluster, Link, check_cluster, load_cluster
from nnscaler_ring.simulator.planner import Job, Plan, StrategyPlan, counted, gigabytes, plan
from nnscaler_ring.tools.commands.options import (
    Amount,
    Size,
    json_option,
    parse_size,
    usage_errors,
)
from nnscaler_ring.tools.commands.tables import Column, make_console, print_table

MOST_LINES = 200
"""Of a pass of a program; shards of millions of tokens travel in very many messages."""


@click.command("plan")
@click.option("--tokens", required=True, type=Size(), help="Of the whole sequence.")
@click.option("--ranks", required=True, type=Size(), help="Devices that share the sequence.")
@click.option("--heads", default=32, show_default=True, type=Size())
@click.option("--kv-heads", type=Size(), help="Default: as many as heads.")
@click.option("--head-dim", default=128, show_default=True, type=Size())
@click.option("--layers", default=1, show_default=True, type=Size())
@click.option("--batch", default=1, show_default=True, type=Size())
@click.option("--dtype", default="bf16", show_default=True, help="fp64, fp32, bf16 or fp16.")
@click.option(
    "--device",
    default="h200",
    show_default=True,
    help="h200, h100, a100, cpu, or a cluster's JSON file.",
)
@click.option(
    "--mask",
    default="causal",
    show_default=True,
    help="causal, full, or causal:LEFT or LEFT:RIGHT, windows in tokens.",
)
@click.option("--forward-only", is_flag=True, help="No backward pass; nothing is kept for it.")
@click.option("--recompute", is_flag=True, help="Keep a layer's input only, compute it again.")
@click.option("--memory-gb", type=Amount(), help="Memory of a device in GB (10^9 bytes).")
@click.option("--reserve-gb", default=0.0, type=Amount(), help="Of it for all but attention.")
@click.option("--node", type=Size(), help="Devices in a node.")
@click.option("--link-gb", type=Amount(), help="GB per second and direction inside a node.")
@click.option("--network-gb", type=Amount(), help="GB per second and direction between nodes.")
@json_option
@click.option(
    "--program",
    "program_of",
    type=Size(),
    metavar="RANK",
    help="Print instead what this rank posts, awaits and computes, in order.",
)
@click.option(
    "--exchange", type=click.Choice([*EXCHANGES]), help="Of --program. Default: the recommended."
)
@click.option("--layout", type=click.Choice([*LAYOUTS]), help="Likewise.")
def plan_command(
    as_json: bool,
    device: str,
    mask: str,
    dtype: str,
    program_of: int | None,
    exchange: str | None,
    layout: str | None,
    **given: Any,
) -> None:
    """Say what to choose, and what every strategy takes in memory, bytes and time.

    Sizes may be written as 65536, 64k (64,000), 64Ki (65,536), 1M or 1e6. The exit code is 1 where
    nothing fits.
    """
    with usage_errors():
        cluster = _changed(load_cluster(device), given)
        heads = given["heads"]
        kv_heads = heads if given["kv_heads"] is None else given["kv_heads"]
        dim = given["head_dim"]
        job = Job(
            tokens=given["tokens"],
            ranks=given["ranks"],
            layers=given["layers"],
            sizes=Sizes(heads, kv_heads, dim, dim, dtype_name(dtype), given["batch"]),
            mask=check_window(*parse_mask(mask)),
            backward=not given["forward_only"],
            recompute=given["recompute"],
            reserve_bytes=given["reserve_gb"] * 1e9,
        )
        _check_program(program_of, job.ranks, exchange or layout, as_json)
        result = plan(job, cluster)
    if program_of is not None:
        chosen = result.recommended or result.strategies[0]
        call = job.call(
            layout or chosen.layout,
            exchange or chosen.exchange,
            tokens=job.tokens,
            ranks=job.ranks,
        )
        _print_program(call.program(program_of), backward=job.backward)
        return
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=2))
    else:
        _show(result)
    if result.recommended is None:
        sys.exit(1)


def parse_mask(text: str) -> tuple[bool, tuple[int, int]]:
    """(causal, window_size) of "causal", "full", "causal:4096" or "4096:128".

    Raises:
        ValueError: none of these.
    """
    if text in ("causal", "full"):
        return text == "causal", (-1, -1)
    left, _, right = text.partition(":")
    try:
        if left == "causal":
            return True, (parse_size(right), -1)
        return False, (parse_size(left), parse_size(right))
    except ValueError:
        raise ValueError(
            f"mask must be causal, full, causal:LEFT or LEFT:RIGHT, got {text!r}; "
            "for example causal:4096."
        ) from None


def _check_program(rank: int | None, ranks: int, chosen: str | None, as_json: bool) -> None:
    if rank is None:
        if chosen:
            raise ValueError("exchange and layout go with --program RANK; a plan has them all.")
        return
    if as_json:
        raise ValueError("json goes with a plan, not with --program; leave one of them out.")
    if not 0 <= rank < ranks:
        raise ValueError(f"program must be a rank, 0 to {ranks - 1}, got {rank}.")


def _print_program(program: Program, *, backward: bool) -> None:
    for some in (False, True) if backward else (False,):
        lines = listing(program, backward=some)
        for line in islice(lines, MOST_LINES):
            click.echo(line)
        rest = sum(1 for _ in lines)
        if rest:
            click.echo(f"  ... {rest:,} more lines")


def _changed(cluster: Cluster, given: dict[str, Any]) -> Cluster:
    """The cluster with what the command line says of it."""
    changes: dict[str, Any] = {}
    if given["memory_gb"] is not None:
        changes["memory_bytes"] = given["memory_gb"] * 1e9
    if given["node"] is not None:
        changes["devices_per_node"] = given["node"]
    for option, name in (("link_gb", "inside"), ("network_gb", "between")):
        if given[option] is not None:
            link: Link = getattr(cluster, name)
            changes[name] = replace(link, bytes_per_second=given[option] * 1e9)
    if not changes:
        return cluster
    changed = replace(cluster, **changes, source=f"{cluster.source} Changed: {', '.join(changes)}.")
    check_cluster(changed)
    return changed


COLUMNS = (
    Column("layout", right=False),
    Column("exchange", right=False),
    Column("memory"),
    Column("sent", 1),
    Column("forward", 2),
    Column("backward", 2),
    Column("hidden", 4),
    Column("busiest", 5),
    Column("ranks", 3),
)


def _show(result: Plan) -> None:
    """The verdict first, then what it rests on."""
    job = result.job
    console = make_console()
    per_rank = -(-job.tokens // job.ranks)
    console.print(
        f"{counted(job.tokens, 'token')} over {counted(job.ranks, 'rank')}, {per_rank:,} each; "
        f"{escape(result.cluster.name)}"
    )
    colour = "green" if result.recommended else "red"
    console.print(f"[bold {colour}]{escape(result.advice)}[/]\n")
    rows = [_row(strategy, strategy is result.recommended) for strategy in result.strategies]
    print_table(console, COLUMNS, rows, more="--json has them")
    console.print(
        "[dim]memory: of a rank; sent: by a rank in a layer; hidden: transfers under computing; "
        "busiest: a rank's work over the mean; ranks: enough memory[/]"
    )
    shown = result.recommended or min(result.strategies, key=lambda s: s.total_memory)
    console.print(f"Memory of {shown.layout}, {shown.exchange}, per rank:")
    for name, size in sorted(shown.memory.items(), key=lambda item: -item[1]):
        console.print(f"  {gigabytes(size):>10}  {name}")
    for strategy in result.strategies:
        if strategy.reason:
            console.print(f"{strategy.layout}, {strategy.exchange}: {escape(strategy.reason)}.")
    console.print(f"[dim]{escape(result.cluster.source)}[/]")


def _row(strategy: StrategyPlan, is_best: bool) -> list[str]:
    cells = [
        strategy.layout,
        strategy.exchange,
        gigabytes(strategy.total_memory),
        gigabytes(strategy.sent.total_bytes),
        duration(strategy.forward_seconds),
        duration(strategy.backward_seconds),
        f"{strategy.overlap:.0%}",
        f"{strategy.busiest_over_mean:.2f}x",
        "never" if strategy.smallest_ranks is None else f">= {strategy.smallest_ranks}",
    ]
    return [f"[bold]{cell}[/]" for cell in cells] if is_best else cells


def duration(seconds: float) -> str:
    """For people."""
    for unit, factor in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
