"""Measure context-parallel attention on this machine; benchmarks/README.md says what is measured.

python benchmarks/bench_context_parallel.py --quick
"""

import fnmatch
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Protocol, TypeVar

import click
from rich.console import Console

# Run as a file, Python looks for packages beside it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import dilated, memory, peers, sent_bytes, speed, table
from benchmarks.progress import Waiting
from benchmarks.rows import ROOT, Row, surroundings, write_rows
from benchmarks.work import Work

WIDTH = 140
"""Columns of the tables where the output is not a terminal."""


class Named(Protocol):
    """Whatever --cases chooses from."""

    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)


@dataclass(frozen=True)
class Choice:
    """The options of the command line."""

    quick: bool
    patterns: tuple[str, ...]
    reps: int
    cores: int
    waiting: Waiting

    def of(self, items: Sequence[T]) -> list[T]:
        """The items whose names match one of the patterns; all without patterns."""
        if not self.patterns:
            return list(items)
        whole = [p if "*" in p else f"*{p}*" for p in self.patterns]
        return [item for item in items if any(fnmatch.fnmatch(item.name, p) for p in whole)]


def run_speed(choice: Choice) -> Iterator[Row]:
    """Time of ranks against one process with as many threads."""
    chosen = choice.of(speed.works(choice.quick))
    return speed.run(chosen, reps=choice.reps, cores=choice.cores, waiting=choice.waiting)


def run_bytes(choice: Choice) -> Iterator[Row]:
    """Sent bytes against the lower bound."""
    world_sizes = [2] if choice.quick else [2, 4]
    chosen = choice.of(sent_bytes.works(choice.quick))
    return sent_bytes.run(chosen, world_sizes=world_sizes, waiting=choice.waiting)


def run_memory(choice: Choice) -> Iterator[Row]:
    """Memory above the inputs."""
    work = Work(1024, 2, 2) if choice.quick else Work(32768, 8, 8)
    chosen = choice.of(memory.ways(choice.quick, choice.cores))
    return memory.run(work, chosen, waiting=choice.waiting)


def run_peers(choice: Choice) -> Iterator[Row]:
    """Other packages; --cases does not apply."""
    return peers.run(peers.work_of(choice.quick), reps=choice.reps, waiting=choice.waiting)


def run_dilated(choice: Choice) -> Iterator[Row]:
    """Dilated attention beside dense attention of the same sequence."""
    chosen = choice.of(dilated.patterns(choice.quick))
    return dilated.run(chosen, reps=choice.reps, cores=choice.cores, waiting=choice.waiting)


PARTS: dict[str, Callable[[Choice], Iterator[Row]]] = {
    "speed": run_speed,
    "bytes": run_bytes,
    "memory": run_memory,
    "peers": run_peers,
    "dilated": run_dilated,
}


@click.command()
@click.option("--quick", is_flag=True, help="Small sizes: does it run? Not for figures.")
@click.option("--only", type=click.Choice(list(PARTS)), help="One part instead of all.")
@click.option("--cases", multiple=True, help="Only cases with this in their name; * is anything.")
@click.option("--reps", type=click.IntRange(1), help="Counted runs per contestant [7; quick: 2].")
@click.option("--out", type=click.Path(path_type=Path), help="JSON lines [none with --quick].")
def main(
    quick: bool, only: str | None, cases: tuple[str, ...], reps: int | None, out: Path | None
) -> None:
    """Measure context-parallel attention on this machine and keep whole result rows."""
    if not out and not quick:
        now = datetime.now(timezone.utc)
        out = ROOT / "benchmarks" / "results" / f"{now:%Y%m%d-%H%M%S}.jsonl"
    choice = Choice(quick, cases, reps or (2 if quick else 7), os.cpu_count() or 1, Waiting())
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    surroundings()  # the commit that the processes are about to load, not a later one
    measured = 0
    for part in [only] if only else PARTS:
        rows = []
        for row in PARTS[part](choice):
            if out:
                write_rows(out, [row])
            rows.append(row)
        measured += len(rows)
        for printed in table.tables(rows):
            console.print(printed.rich())
    if not measured:
        raise click.BadParameter(f"no case is named like {cases}.", param_hint="--cases")
    click.echo(f"rows: {out}" if out else "rows: not kept; give --out to keep them")


if __name__ == "__main__":
    main()
