"""`nnscaler-ring`: the command line. Its commands are in nnscaler_ring/commands, one file each."""

from __future__ import annotations

import sys

NEEDED = ("click", "rich")
"""The pip extra `cli`: click reads arguments, rich draws tables and progress bars."""


def main() -> None:
    """The console script."""
    try:
        from nnscaler_ring.tools.commands import commands
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in NEEDED:
            raise
        print(
            f"nnscaler-ring needs {error.name}: pip install 'nnscaler_ring[cli]'", file=sys.stderr
        )
        sys.exit(2)
    commands(prog_name="nnscaler-ring")
