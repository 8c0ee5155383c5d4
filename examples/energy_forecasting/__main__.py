"""The command line: `python -m examples.energy_forecasting` in the repository's root, or
`python path/to/examples/energy_forecasting` anywhere."""

import sys
from pathlib import Path

if not __package__:
    # Run as a folder: this folder is on the path, where the modules of the example are not found.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.energy_forecasting.cli import main

if __name__ == "__main__":
    main()
