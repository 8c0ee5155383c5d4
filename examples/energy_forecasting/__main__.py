"""The command line: `python -m examples.energy_forecasting`."""

from examples.energy_forecasting.cli import commands

if __name__ == "__main__":
    commands(prog_name="python -m examples.energy_forecasting")
