"""Options and errors that several commands share."""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from nnscaler_ring.tools.launch import BACKENDS, RankError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
LARGEST_SIZE = 2**50
"""Tokens, heads and the like; more is a slip of the hand."""


def parse_size(text: str) -> int:
    """A whole number such as 65536, 1_000_000, 1e6, 64k, 64Ki or 1.5M; k is 1000, Ki is 1024.

    Raises:
        ValueError: it is none, is not whole, or is larger than `LARGEST_SIZE`.
    """
    match = re.fullmatch(
        r"([+-]?[0-9][0-9_]*)(\.[0-9]+)?(e\+?[0-9]{1,2})?([kmg]i?)?", text.strip().lower(), re.ASCII
    )
    if match is None:
        raise ValueError(f"sizes are whole numbers such as 65536, 64k, 64Ki, 1M or 1e6, got {text}")
    whole, fraction, exponent, unit = (part or "" for part in match.groups())
    digits = int(whole.replace("_", "") + fraction[1:]) if len(whole) < 40 else LARGEST_SIZE + 1
    size = digits * 10 ** int(exponent[1:] or 0) * UNITS[unit]
    size, rest = divmod(size, 10 ** len(fraction[1:]))
    if rest or abs(size) > LARGEST_SIZE:
        raise ValueError(f"sizes are whole and at most 2**50, got {text}")
    return size


class Size(click.ParamType):
    """A size from `least` on; see `parse_size`."""

    name = "size"

    def __init__(self, least: int | None = None) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number."""
        try:
            size = value if isinstance(value, int) else parse_size(value)
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)
        if self.least is not None and size < self.least:
            self.fail(f"{size} is not in the range x>={self.least}.", param, ctx)
        return size


class Amount(click.ParamType):
    """A finite number; click's own float takes nan and inf as well."""

    name = "number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number."""
        try:
            amount = float(value)
        except ValueError:
            amount = math.nan
        if not math.isfinite(amount):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return amount


SEED = click.IntRange(0, 2**63 - 1)


def check_writable(path: Path | None) -> None:
    """Whether a file can be written, asked before something is measured that belongs into it.

    Folders that lack on the way are made; the file itself is not.

    Raises:
        OSError: it cannot.
    """
    if path is None:
        return
    if path.is_dir():
        raise IsADirectoryError(f"{path} must be a file, got a folder; name a file in it.")
    if path.exists():
        if not os.access(path, os.W_OK):
            raise PermissionError(f"{path} must be a file that can be written, got one that not.")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON alone; what goes on goes to stderr."
)
ranks_option = click.option(
    "--ranks",
    default=2,
    show_default=True,
    type=click.IntRange(1, 64),
    help="Processes to start, one thread or one GPU each.",
)
device_option = click.option(
    "--device",
    default="cpu",
    show_default=True,
    type=click.Choice(list(BACKENDS)),
    help="cpu: ranks talk over gloo. cuda: over NCCL, one GPU a rank.",
)


@contextmanager
def usage_errors() -> Iterator[None]:
    """What is wrong with the arguments, as one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from error


@contextmanager
def rank_errors() -> Iterator[None]:
    """A rank that failed, with its own traceback and not the launcher's; exit code 1."""
    try:
        yield
    except RankError as error:
        raise click.ClickException(str(error)) from error
