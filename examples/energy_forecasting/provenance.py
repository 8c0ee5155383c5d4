"""What a number needs beside it: command, code, versions, device, date and data."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from examples.energy_forecasting.series import HourlySeries
from nnscaler_ring.core.device import device_name
from nnscaler_ring.tools.machine import git_output, package_versions

HERE = Path(__file__).parent
RUGGLES = (
    "EIA Form EIA-930, cleaned by Ruggles et al., Sci Data 7, 155 (2020), "
    "doi:10.1038/s41597-020-0483-x; v1.4, doi:10.5281/zenodo.3517196; CC BY 4.0"
)
ATTRIBUTION = {
    "us48_2024_excerpt.csv": RUGGLES,
    "eia930_CONUS_2020_2024.csv": RUGGLES,
    "eia930_CISO_2015_2020.csv": RUGGLES,
}


def provenance(series: HourlySeries) -> dict[str, Any]:
    """As results/*.json has it."""
    return {
        "command": this_command(),
        "code": code(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name("cpu"),
        "versions": package_versions() | {"numpy": np.__version__},
        "data": asdict(series.quality)
        | {"source": series.source, "attribution": ATTRIBUTION.get(series.source)},
    }


def this_command() -> str:
    """The command line, as one can type it again."""
    return shlex.join(["python", "-m", "examples.energy_forecasting", *sys.argv[1:]])


def code() -> str:
    """The commit, and whether files differ from it; "unknown" where there is no git repository.

    Results, which the commands write, do not count as a difference.
    """
    commit = git_output(HERE, "rev-parse", "HEAD")
    changes = git_output(
        HERE, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude)results"
    )
    if commit is None or changes is None:
        return "unknown"
    return f"{commit} with uncommitted changes" if changes else commit
