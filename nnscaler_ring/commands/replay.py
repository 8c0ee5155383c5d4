"""`nnscaler-ring bench --device`: kernels and the ranks' schedules, replayed on one device."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nnscaler_ring.machine import device_name, device_types, package_versions, source_commit
from nnscaler_ring.replay import Case, cases, measure

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
    console: Console, device: str, tokens: Sequence[int], ranks: int, reps: int, out: Path | None
) -> None:
    """Measure every case, print each as it is done, and append its row to a file.

    Raises:
        ValueError: this machine has no such device.
    """
    if device not in device_types():
        raise ValueError(
            f"device {device} must be one that torch finds here, {device_types()}; it needs a GPU "
            f"and a CUDA build of torch, this is {torch.__version__}."
        )
    rows = []
    for case in cases(tokens or TOKENS[device], ranks=ranks, **FIELDS[device]):
        row = make_row(case, device, reps)
        rows.append(row)
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        console.print(f"{case.label}: {row['error'] or 'done'}", highlight=False)
    console.print(f"{device_name(device)}, {case.shape}, {ranks} ranks", highlight=False)
    console.print(_table(rows))
    modelled = [row["results"]["modelled_communication"] for row in rows if row["results"]]
    if modelled:
        console.print(NOTE.format(modelled[0]["cluster"]), highlight=False)
    console.print(f"rows: {out}" if out else "rows: not kept; give --out to keep them")


def make_row(case: Case, device: str, reps: int) -> dict[str, Any]:
    """A whole row, as those of benchmarks/rows.py."""
    results: dict[str, Any] = {}
    error = None
    try:
        results = measure(case, torch.device(device), reps=reps)
    except torch.OutOfMemoryError as problem:
        error = f"out of memory: {problem}".splitlines()[0]
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
        "versions": package_versions() | {"cuda": torch.version.cuda},
        **source_commit(),
        "command": shlex.join(["nnscaler-ring", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("case", box=None, pad_edge=False)
    names = ("kernel", "one device", "TFLOP/s", "kept", "busiest", "merge", "modelled")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        results = row["results"]
        if not results:
            table.add_row(row["parameters"]["label"], "-")
            continue
        table.add_row(
            row["parameters"]["label"],
            results["kernel"],
            f"{row['seconds']['median'] * 1e3:.1f} ms",
            f"{results['kernel_tflops_per_second']:.3g}",
            f"{results['kept_fraction']:.3f}",
            f"{results['busiest_rank_over_mean']:.2f}",
            f"{results['merge']['least_bytes_per_second'] / 1e9:.0f} GB/s",
            f"{results['modelled_communication']['largest_share_of_compute']:.1%}",
        )
    return table
