"""Options and errors that several commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from nnscaler_ring.tools.launch import BACKENDS, RankError

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
