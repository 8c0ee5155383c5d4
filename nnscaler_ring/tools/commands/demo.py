"""`nnscaler-ring demo`: the demonstration, live on the screen."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
import time
from pathlib import Path

import click
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from nnscaler_ring.tools.commands.options import (
    SEED,
    Size,
    check_writable,
    device_option,
    json_option,
    rank_errors,
    ranks_option,
    usage_errors,
)
from nnscaler_ring.tools.commands.tables import make_console
from nnscaler_ring.tools.demo.memory import AttentionSize
from nnscaler_ring.tools.demo.report import MIB, memory_per_rank, sentence, summary, write_report
from nnscaler_ring.tools.demo.run import (
    ENGINES,
    DemoConfig,
    DemoResult,
    prepare,
    run_demo,
    tokens_per_second,
)
from nnscaler_ring.tools.demo.shard import OPS
from nnscaler_ring.tools.demo.train import Step, TrainConfig

EXAMPLE = "examples/energy_forecasting"
"""Where the demonstration leads to, in the repository."""

ROWS = 10
"""Steps that a table shows."""


@click.command()
@click.option(
    "--engine",
    default=DemoConfig.engine,
    show_default=True,
    type=click.Choice(list(ENGINES)),
    help="torch: ranks over torch.distributed alone. nnscaler: through nnScaler's parallelize().",
)
@ranks_option
@click.option("--op", default=OPS[0], show_default=True, type=click.Choice(OPS))
@click.option("--steps", default=TrainConfig.steps, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--tokens",
    default=TrainConfig.tokens,
    show_default=True,
    type=Size(8),
    help="Length of a training sequence, over all ranks.",
)
@click.option(
    "--memory-tokens",
    default=AttentionSize.tokens,
    show_default=True,
    type=Size(8),
    help="Length of the sequence whose attention memory is measured.",
)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Train on this file instead of Python's standard library.",
)
@device_option
@click.option(
    "--out",
    default=Path("demo"),
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the figure and demo.json.",
)
@click.option("--seed", default=TrainConfig.seed, show_default=True, type=SEED)
@json_option
def demo(
    engine: str,
    ranks: int,
    op: str,
    steps: int,
    tokens: int,
    memory_tokens: int,
    text: Path | None,
    device: str,
    out: Path,
    seed: int,
    as_json: bool,
) -> None:
    """Train a small model on one device and on ranks, and show that it is the same training."""
    if importlib.util.find_spec("matplotlib") is None:
        raise click.UsageError("demo needs matplotlib: pip install 'nnscaler_ring[demo]'")
    config = DemoConfig(
        engine=engine,
        ranks=ranks,
        device=device,
        text=text,
        train=TrainConfig(op=op, tokens=tokens, steps=steps, seed=seed),
        attention=AttentionSize(memory_tokens),
    )
    with usage_errors():
        corpus = prepare(config)
        check_writable(out / "demo.json")
    screen = Console(stderr=as_json)
    screen.print(f"{tokens} tokens a step from {corpus.source}", highlight=False, markup=False)
    with rank_errors(), Screen(screen) as watch:
        result = run_demo(config, corpus, watch)
    command = shlex.join(["nnscaler-ring", *sys.argv[1:]])
    written = write_report(config, result, out, command)
    if as_json:
        click.echo(json.dumps(summary(config, result, command), indent=2))
    else:
        _show(config, result, written)
    if not result.is_equal:
        sys.exit(1)


def _show(config: DemoConfig, result: DemoResult, written: list[Path]) -> None:
    """The sentence first, then the figures that it rests on."""
    console = make_console()
    colour = "green" if result.is_equal else "red"
    console.print(f"\n[bold {colour}]{escape(sentence(config, result))}[/]\n")
    console.print(_losses_table(result.alone.steps, result.ranks[0].steps))
    console.print(_figures_table(config, result))
    for path in written:
        console.print(f"wrote {path}", markup=False)
    console.print(f"\nNext, a model on real data: {EXAMPLE}/README.md")


class Screen:
    """The table of losses and a progress bar, live; a `Watch`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.stages: list[list[Step]] = []
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self.live = Live(self._render(), console=console, transient=True)

    def __enter__(self) -> Screen:
        self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.live.stop()

    def start(self, stage: str, total: int) -> None:
        """A new stage: a new bar."""
        self.stages.append([])
        self.stage, self.started = stage, time.monotonic()
        self.task = self.progress.add_task(stage, total=total)
        self.live.update(self._render())

    def advance(self, step: Step | None) -> None:
        """One more step of the stage."""
        if step is not None:
            self.stages[-1].append(step)
        self.progress.advance(self.task)
        if self.progress.tasks[-1].finished:
            seconds = time.monotonic() - self.started
            self.console.print(f"{self.stage}: {seconds:.1f} s", highlight=False)
        self.live.update(self._render())

    def _render(self) -> Group:
        table = _losses_table(*[*self.stages, [], []][:2], last=True)
        return Group(table, self.progress)


def _losses_table(alone: list[Step], ranks: list[Step], *, last: bool = False) -> Table:
    """Some steps: the last ones, or evenly spread over the training."""
    table = Table("step", "loss, one device", "loss, ranks", "relative difference")
    for column in table.columns:
        column.justify = "right"
    longest = max(len(alone), len(ranks))
    shown = len(ranks) or len(alone)
    if last:
        numbers = list(range(max(0, shown - ROWS), shown))
    else:
        numbers = sorted({n * (longest - 1) // (ROWS - 1) for n in range(ROWS)})
    for number in numbers:
        one = alone[number].loss
        if number < len(ranks):
            many = ranks[number].loss
            table.add_row(f"{number}", f"{one:.6f}", f"{many:.6f}", f"{abs(one - many) / one:.1e}")
        else:
            table.add_row(f"{number}", f"{one:.6f}", "", "")
    return table


def _figures_table(config: DemoConfig, result: DemoResult) -> Table:
    alone, ranks = result.alone, result.ranks
    sent = [step.sent.total_bytes for rank in ranks for step in rank.steps]
    tokens = config.train.tokens
    table = Table("", "one device", f"{config.ranks_name}, each")
    table.add_row(
        "tokens per second (all ranks)",
        f"{tokens_per_second(alone, tokens):.0f}",
        f"{tokens_per_second(ranks[0], tokens):.0f}",
    )
    table.add_row("sent for attention, per step", "0", f"{sum(sent) / len(sent) / MIB:.2f} MiB")
    table.add_row(
        "peak memory of a training step",
        f"{alone.peak_bytes / MIB:.0f} MiB",
        f"{max(rank.peak_bytes for rank in ranks) / MIB:.0f} MiB",
    )
    per_rank = memory_per_rank(result)
    for count, highest in per_rank.items():
        share = f"({highest / per_rank[1]:.2f} of N = 1)" if count > 1 else ""
        table.add_row(
            f"peak memory of attention, N = {count}",
            "" if count > 1 else f"{highest / MIB:.0f} MiB",
            f"{highest / MIB:.0f} MiB {share}" if count > 1 else "",
        )
    return table
