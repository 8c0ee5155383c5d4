"""Result rows: whole records, one JSON line each, with where, when and of what they were taken."""

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import nnscaler_ring
from nnscaler_ring.tools.machine import source_commit

ROOT = Path(__file__).resolve().parents[1]

Row = dict[str, Any]


def make_row(
    part: str,
    name: str,
    parameters: dict[str, Any],
    *,
    samples: Sequence[float] = (),
    results: dict[str, Any] | None = None,
    error: str | None = None,
) -> Row:
    """A whole row.

    Args:
        part: speed, memory, bytes or peers.
        name: what was measured.
        parameters: everything that it was measured with.
        samples: seconds of each counted run, in order.
        results: other figures, units in their names.
        error: why there are none.
    """
    return {
        "part": part,
        "name": name,
        "parameters": parameters,
        "seconds": summary(samples),
        "samples": list(samples),
        "results": results or {},
        "error": error,
        **surroundings(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def summary(samples: Sequence[float]) -> dict[str, float] | None:
    """Median and spread; None of no samples."""
    if not samples:
        return None
    if len(samples) == 1:
        quartiles = [samples[0]] * 3
    else:
        quartiles = statistics.quantiles(samples, n=4, method="inclusive")
    return {
        "median": statistics.median(samples),
        "min": min(samples),
        "max": max(samples),
        "quartile_1": quartiles[0],
        "quartile_3": quartiles[2],
    }


@lru_cache(maxsize=1)
def surroundings() -> dict[str, Any]:
    """The same for all rows of one command: device, versions, commit and the command itself."""
    return {
        "device": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": platform.platform(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "nnscaler_ring": nnscaler_ring.__version__,
        },
        **source_commit(),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
    }


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Append rows to a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, allow_nan=False) + "\n")


def read_rows(path: Path) -> list[Row]:
    """All rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
