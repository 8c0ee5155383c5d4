"""`nnscaler-ring bench --device`: kernels and the ranks' schedules, replayed on one device."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.markup import escape

from nnscaler_ring.core.device import device_name
from nnscaler_ring.simulator.simulation import LIMITS
from nnscaler_ring.tools.commands.tables import Column, make_console, print_table
from nnscaler_ring.tools.machine import (
    cuda_versions,
    device_types,
    package_versions,
    source_commit,
)
from nnscaler_ring.tools.replay import Case, cases, measure

TOKENS = {"cuda": (65536, 131072, 524288), "cpu": (2048, 4096, 8192)}
FIELDS: dict[str, dict[str, Any]] = {
    "cuda": {},
    "cpu": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": "float32"},
}
"""What differs from the defaults of `Case`: a CPU has no time for more."""

NOTE = (
    "Compute only: kernels, merges and sums of all ranks, one after another on one device. "
    "Communication is modelled: counted bytes over the links of cluster {}, nothing was sent."
)


def replay(
    device: str,
    tokens: Sequence[int],
    ranks: int,
    reps: int,
    out: Path | None,
    only: Sequence[str] = (),
    commit: str | None = None,
    *,
    as_json: bool = False,
) -> bool:
    """Measure every case, print each as it is done, and append its row to a file.

    `only`: texts; the cases that have one of them in their label. `commit`: of the source, where
    there is no git checkout to ask.

    Returns:
        Whether all cases were measured, and right.

    Raises:
        ValueError: this machine has no such device, there is no such case, or git knows another
            commit.
    """
    if device not in device_types():
        raise ValueError(
            f"device {device} must be one that torch finds here, {device_types()}; it needs a GPU "
            f"and a CUDA build of torch, this is {torch.__version__}."
        )
    known = cases(tokens or TOKENS[device], ranks=ranks, **FIELDS[device])
    chosen = [case for case in known if not only or any(text in case.label for text in only)]
    if not chosen:
        labels = ", ".join(repr(case.label) for case in known)
        raise ValueError(f"only must be a part of one of {labels}, got {list(only)}.")
    facts = {"versions": package_versions() | cuda_versions(), **_source(commit)}
    rows = []
    for case in chosen:
        row = make_row(case, device, reps, facts)
        rows.append(row)
        if out:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        told = row["error"] or f"done in {row['took_seconds']:.0f} s"
        Console(stderr=as_json, highlight=False).print(f"{case.label}: {told}", markup=False)
    if as_json:
        click.echo(json.dumps(rows, indent=2, allow_nan=False))
    else:
        _show(rows, f"{device_name(device)}, {case.shape}, {ranks} ranks", out)
    return not any(row["error"] for row in rows)


def _show(rows: list[dict[str, Any]], title: str, out: Path | None) -> None:
    console = make_console()
    console.print(title, markup=False)
    print_table(console, COLUMNS, [_row(row) for row in rows], more="--json has them")
    modelled = [row["results"]["modelled_communication"] for row in rows if row["results"]]
    if modelled:
        console.print(NOTE.format(modelled[0]["cluster"]), markup=False)
    console.print(
        f"rows: {out}" if out else "rows: not kept; give --out to keep them", markup=False
    )


def _source(commit: str | None) -> dict[str, Any]:
    """The commit that git knows, else the one that was given."""
    source = source_commit()
    if source["commit"] is None:
        return source | {"commit": commit}
    if commit is not None and commit != source["commit"]:
        raise ValueError(
            f"commit must be that of the checkout, {source['commit']}, got {commit}; leave it out."
        )
    return source


def make_row(case: Case, device: str, reps: int, facts: dict[str, Any]) -> dict[str, Any]:
    """A whole row, as those of benchmarks/rows.py; `facts`: versions and commit, of all rows."""
    results: dict[str, Any] = {}
    error = None
    start = time.monotonic()
    try:
        results = measure(case, torch.device(device), reps=reps)
        limit, found = LIMITS[case.dtype], results["relative_l2_to_one_device"]
        if found > limit:
            error = f"WRONG: ranks are {found:.1e} off one device, more than {limit:g}"
    except torch.OutOfMemoryError as problem:
        error = f"out of memory: {problem}".splitlines()[0]
    except RuntimeError as problem:  # one kernel that fails must not cost the other cases
        error = f"failed: {problem}".splitlines()[0]
    samples = results.get("one_device_seconds", [])
    return {
        "part": "replay",
        "name": "direct exchange, rank by rank on one device",
        "parameters": {
            "work": case.name,
            "label": case.label,
            "device": device,
            "threads": torch.get_num_threads(),
            **asdict(case),
        },
        "seconds": {"median": statistics.median(samples), "min": min(samples), "max": max(samples)}
        if samples
        else None,
        "samples": samples,
        "results": results,
        "error": error,
        "device": {
            "name": device_name(device),
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "system": platform.platform(),
        },
        "took_seconds": time.monotonic() - start,
        **facts,
        "command": shlex.join(["nnscaler-ring", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


COLUMNS = (
    Column("case", right=False),
    Column("kernel", 1),
    Column("one device"),
    Column("TFLOP/s"),
    Column("kept", 2),
    Column("busiest", 3),
    Column("merge", 4),
    Column("modelled", 5),
)


def _row(row: dict[str, Any]) -> list[str]:
    results = row["results"]
    label = escape(row["parameters"]["label"])
    if not results:
        return [label, "-", *[""] * (len(COLUMNS) - 2)]
    return [
        label,
        results["kernel"],
        f"{row['seconds']['median'] * 1e3:.1f} ms",
        f"{results['kernel_tflops_per_second']:.3g}",
        f"{results['kept_fraction']:.3f}",
        f"{results['busiest_rank_over_mean']:.2f}x",
        f"{results['merge']['least_bytes_per_second'] / 1e9:.0f} GB/s",
        f"{results['modelled_communication']['largest_share_of_compute']:.1%}",
    ]
