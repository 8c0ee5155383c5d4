"""The commands: data, train, evaluate, forecast, ranks."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import click
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from examples.energy_forecasting.baselines import fit_and_forecast
from examples.energy_forecasting.config import EXCERPT, Config, config_from
from examples.energy_forecasting.evaluation import (
    anomalies,
    check_origins,
    collect,
    forecast_on_rank,
    latest_bands,
    past_origins,
    score,
    why_no_anomalies,
    with_adapted_bands,
)
from examples.energy_forecasting.holiday import holiday_days
from examples.energy_forecasting.plausibility import DEMAND, QUANTITIES, RULE
from examples.energy_forecasting.provenance import code, provenance, this_command
from examples.energy_forecasting.scores_table import show_scores
from examples.energy_forecasting.series import HOUR, RESOLUTIONS, HourlySeries
from examples.energy_forecasting.sources.csv_file import read_columns, read_csv
from examples.energy_forecasting.sources.http import WrongKeyError
from examples.energy_forecasting.splits import split
from examples.energy_forecasting.training import Checkpoint
from examples.energy_forecasting.training import train as train_on_rank
from nnscaler_ring.tools.launch import RankError, run_ranks

HERE = Path(__file__).parent
EXCERPT_CSV = HERE / "data" / "us48_2024_excerpt.csv"
OUT = Path("energy")
console = Console(soft_wrap=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def commands() -> None:
    """Forecast electricity demand from a year or more of hourly context."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")


def main() -> None:
    """The command line."""
    commands(prog_name="python -m examples.energy_forecasting")


class UserError(click.ClickException):
    """What a user can mend, in one line."""

    exit_code = 2


@contextmanager
def plain_errors() -> Iterator[None]:
    """What went wrong as one line; exit codes are those of `nnscaler-ring`.

    2: wrong arguments, files or settings, no key, a package that is missing. 1: a source or a rank
    failed.
    """
    try:
        yield
    except RankError as error:
        raise click.ClickException(str(error).splitlines()[-1]) from error
    except (ValueError, OSError, ModuleNotFoundError, WrongKeyError) as error:
        raise UserError(str(error)) from error
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error


def series_options(command: Any) -> Any:
    """Which series."""
    options = [
        click.option(
            "--csv",
            "csv_path",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="An hourly CSV file; without it the shipped excerpt.",
        ),
        click.option("--target", help="The column to forecast; the usual names are found."),
        click.option("--channel", "channels", multiple=True, help="Another column to learn from."),
        click.option(
            "--join",
            "joined",
            multiple=True,
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Another CSV file; all its columns become channels.",
        ),
        click.option(
            "--time-zone", default="UTC", show_default=True, help="Of times without an offset."
        ),
        click.option(
            "--quantity",
            default=DEMAND,
            show_default=True,
            type=click.Choice(QUANTITIES),
            help="demand: values that it cannot have count as missing. any: prices and the like.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


ranks_option = click.option(
    "--ranks", default=2, show_default=True, type=click.IntRange(1, 64), help="Processes."
)
checkpoint_option = click.option(
    "--checkpoint",
    type=click.Path(dir_okay=False, path_type=Path),
    default=OUT / "checkpoint.pt",
    show_default=True,
)
out_option = click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=OUT, show_default=True
)


def load(
    csv_path: Path | None,
    target: str | None,
    channels: tuple[str, ...],
    joined: tuple[Path, ...],
    time_zone: str,
    quantity: str,
) -> HourlySeries:
    """The series, with a word on its quality."""
    series = read_csv(
        csv_path or EXCERPT_CSV,
        target=target,
        channels=channels,
        time_zone=time_zone,
        quantity=quantity,
    )
    for path in joined:
        series = series.with_columns(read_columns(path, time_zone=time_zone))
    show_quality(series)
    return series


def show_quality(series: HourlySeries) -> None:
    """What was found in the rows, and by which rule values count as missing."""
    console.print(f"{series.source}: {series.quality.sentence()}", highlight=False, markup=False)
    if series.quality.implausible_values:
        console.print(f"implausible values count as missing: {RULE}", highlight=False)


@commands.command()
@click.argument("source", type=click.Choice(["eia", "caiso", "csv", "gridstatus"]))
@click.option("--region", help="EIA region (US48), CAISO area or price node, or gridstatus's ISO.")
@click.option("--start", help="First hour, UTC, for example 2020-01-01.")
@click.option("--end", help="First hour that is not wanted.")
@click.option(
    "--what",
    type=click.Choice(["demand", "generation", "subregions", "price"]),
    default="demand",
    show_default=True,
)
@click.option("--resolution", type=click.Choice(list(RESOLUTIONS)), default="hourly")
@series_options
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
def data(
    source: str,
    region: str | None,
    start: str | None,
    end: str | None,
    what: str,
    resolution: str,
    out: Path,
    **given: Any,
) -> None:
    """Fetch or clean a series, and write it as CSV."""
    with plain_errors():
        if source == "csv":
            series = load(**given)
        else:
            if start is None or end is None:
                raise ValueError(f"--start and --end must be given for {source}.")
            series = fetch(source, region, start, end, what)
            show_quality(series)
        series.write_csv(out, resolution)
    console.print(f"wrote {out}")


def fetch(source: str, region: str | None, start: str, end: str, what: str) -> HourlySeries:
    """From a source on the network.

    Raises:
        ValueError: the source does not have that.
    """
    from examples.energy_forecasting.sources.caiso import NORTHERN_HUB, WHOLE_AREA, CAISOClient
    from examples.energy_forecasting.sources.eia import EIAClient
    from examples.energy_forecasting.sources.gridstatus_source import get_load

    match source, what:
        case "eia", "demand":
            return EIAClient().get_electricity_demand(region or "US48", start, end)
        case "eia", "generation":
            return EIAClient().get_generation_mix(region or "US48", start, end)
        case "eia", "subregions":
            return EIAClient().get_subregion_demand(region or "CISO", start, end)
        case "caiso", "demand":
            return CAISOClient().get_electricity_demand(start, end, region or WHOLE_AREA)
        case "caiso", "price":
            return CAISOClient().get_price(start, end, region or NORTHERN_HUB)
        case "gridstatus", "demand":
            return get_load(region or "CAISO", start, end)
    raise ValueError(f"--what {what} must be something that {source} has.")


@commands.command()
@series_options
@ranks_option
@checkpoint_option
@click.option(
    "--context", type=int, help="Hours that the model sees; a year, six weeks of the excerpt."
)
@click.option("--steps", type=int, help="Training steps.")
@click.option("--seed", default=0, show_default=True, type=int)
@click.option("--clocks", help="IANA zone whose clocks people follow; America/New_York.")
@click.option(
    "--holidays",
    default="US",
    show_default=True,
    help="Country, or subdivision such as US-CA, whose public holidays count; '' for none.",
)
@click.option("--max-minutes", type=float, default=float("inf"), help="Stop, to be resumed.")
@click.option("--excerpt", is_flag=True, help="The settings of the excerpt, for short series.")
def train(
    ranks: int,
    checkpoint: Path,
    context: int | None,
    steps: int | None,
    seed: int,
    clocks: str | None,
    holidays: str,
    max_minutes: float,
    excerpt: bool,
    **given: Any,
) -> None:
    """Train, or go on training where a checkpoint is."""
    with plain_errors():
        config = EXCERPT if excerpt or given["csv_path"] is None else Config()
        changes = {"context": context, "steps": steps, "time_zone": clocks}
        given_changes: dict[str, Any] = {
            name: value for name, value in changes.items() if value is not None
        }
        config = replace(config, seed=seed, holidays=holidays, **given_changes)
        check_config(config)
        series = load(**given)
        split(series, config)
        with Progress(console=console) as progress:
            task = progress.add_task("training", total=config.steps)

            def show(rank: int, value: Any) -> None:
                step, loss, validation = value
                if rank == 0:
                    progress.update(task, completed=step)
                    if validation:
                        progress.console.print(
                            f"step {step}: loss {loss:.4f}, validation {validation[0][1]:.4f}",
                            highlight=False,
                        )

            saved = run_ranks(
                ranks,
                train_on_rank,
                series,
                config,
                checkpoint,
                60 * max_minutes,
                {"command": this_command(), "code": code()},
                on_report=show,
                timeout_seconds=600,
            )[0]
    done = "done" if saved.step == config.steps else "stopped, run again to go on"
    console.print(f"{checkpoint}: step {saved.step} of {config.steps} ({done})", highlight=False)


def load_trained(checkpoint: Path) -> Checkpoint:
    """Raises ValueError where there is nothing to forecast with."""
    if not checkpoint.exists():
        raise ValueError(f"{checkpoint} does not exist; run train first, or name a --checkpoint.")
    saved = Checkpoint.load(checkpoint)
    saved.check_validated()
    return saved


def check_config(config: Config) -> None:
    """What a command line can get wrong."""
    try:
        ZoneInfo(config.time_zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(
            f"--clocks must be an IANA name such as 'America/New_York', got {config.time_zone!r}."
        ) from None
    holiday_days(np.array(["2024-01-01"], dtype="datetime64[D]"), config.holidays)
    if config.context < config.recent:
        raise ValueError(f"--context must be at least {config.recent}, got {config.context}.")
    if config.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {config.steps}.")


@commands.command()
@series_options
@ranks_option
@checkpoint_option
@out_option
@click.option(
    "--baselines",
    default="all",
    show_default=True,
    type=click.Choice(["all", "naive"]),
    help="naive: without ridge regression and gradient boosting, which take their time.",
)
def evaluate(ranks: int, checkpoint: Path, out: Path, baselines: str, **given: Any) -> None:
    """Score the test's daily origins; write results.json and report.html."""
    with plain_errors():
        from examples.energy_forecasting.report import write_html

        series = load(**given)
        saved = load_trained(checkpoint)
        config = config_from(saved.config)
        parts = split(series, config)
        origins = [parts.validation, parts.test]
        check_origins(series, saved, parts.validation)
        with Progress(console=console) as progress:
            task = progress.add_task("forecasting", total=sum(map(len, origins)))
            by_rank = run_ranks(
                ranks,
                forecast_on_rank,
                series,
                saved,
                origins,
                on_report=lambda rank, count: progress.advance(task, count),
                timeout_seconds=600,
            )
        validation, test = (
            collect(series, saved, part, [found[n] for found in by_rank])
            for n, part in enumerate(origins)
        )
        validation, test = with_adapted_bands(validation, test, config)
        if baselines == "all":
            with console.status("ridge regression and gradient boosting"):
                first = config.context + config.history
                (learned,) = fit_and_forecast(
                    saved.features(series), config, first, parts.train_stop, [parts.test]
                )
            test = replace(test, learned=learned)
        scores = score(validation, test, config)
        withheld = why_no_anomalies(scores, config)
        found = [] if withheld else anomalies(validation, test, config)
        results: dict[str, Any] = {
            "series": series.source,
            "horizons": scores,
            "anomalous_hours": None if withheld else len(found),
            "anomalies_withheld": withheld,
            "anomalies": found[:50],
            "training": {
                **saved.began_by,
                "ranks": saved.ranks,
                "steps": saved.step,
                "seconds": round(saved.seconds, 1),
                "losses": saved.losses,
                "validation": saved.validation,
            },
            "config": saved.config,
            "provenance": provenance(series),
        }
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "results.json", json.dumps(results, indent=1) + "\n")
        write_whole(out / "report.html", write_html(results, test, found, config))
    show_scores(results["horizons"])
    if withheld:
        console.print(f"No hour is called anomalous: {withheld}.", highlight=False)
    console.print(f"wrote {out / 'results.json'} and {out / 'report.html'}")


def write_whole(path: Path, content: str | bytes) -> None:
    """All or nothing."""
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_bytes(content if isinstance(content, bytes) else content.encode())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@commands.command("ranks")
@series_options
@click.option("--context", default=35_040, show_default=True, help="Hours, to measure memory at.")
@click.option("--steps", default=5, show_default=True, type=click.IntRange(1), help="To compare.")
@out_option
def compare(context: int, steps: int, out: Path, **given: Any) -> None:
    """The same training on 1, 2 and 4 ranks: losses, forecasts, and the memory of a rank."""
    with plain_errors():
        from examples.energy_forecasting.plots import memory_figure, png
        from examples.energy_forecasting.same_on_ranks import compare_ranks

        series = load(**given)
        config = EXCERPT if given["csv_path"] is None else Config()
        results = compare_ranks(series, config, steps, context)
        results["provenance"] = provenance(series)
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "ranks.json", json.dumps(results, indent=1) + "\n")
        write_whole(out / "memory.png", png(memory_figure(results["memory"])))
    table = Table("ranks", "loss, relative", "in float64", "forecast, MW", "MiB, busiest rank")
    for same, memory in zip(results["same"], results["memory"]["by_ranks"], strict=True):
        table.add_row(
            f"{same['ranks']}",
            f"{same['largest_relative_difference_of_a_loss']:.1e}",
            f"{same['largest_relative_difference_in_float64']:.1e}",
            f"{same['largest_difference_of_a_forecast']:.2g}",
            f"{max(memory['peak_bytes']) / 2**20:.0f}",
        )
    console.print(table)
    console.print(f"wrote {out / 'ranks.json'} and memory.png")


@commands.command()
@series_options
@ranks_option
@checkpoint_option
@out_option
def forecast(ranks: int, checkpoint: Path, out: Path, **given: Any) -> None:
    """Forecast from the series' last 00:00 UTC on; write forecast.csv and forecast.png."""
    with plain_errors():
        from examples.energy_forecasting.plots import forecast_figure, png

        series = load(**given)
        saved = load_trained(checkpoint)
        config = config_from(saved.config)
        days = (series.start + np.array([len(series)]) * HOUR).astype("datetime64[D]")
        origin = int((days[0] - series.start) / HOUR)
        check_origins(series, saved, range(origin, origin + 1))
        past = past_origins(series, saved, origin)
        by_rank = run_ranks(ranks, forecast_on_rank, series, saved, [past], timeout_seconds=600)
        made = collect(series, saved, past, [found[0] for found in by_rank])
        quantiles, told, is_held = latest_bands(made, config)
        start = series.start + origin * HOUR
        names = [f"quantile_{level:g}" for level in config.model.quantiles]
        columns = {name: quantiles[:, n].round(1) for n, name in enumerate(names)}
        times = start + np.arange(len(quantiles)) * HOUR
        known = series.target[max(0, origin - 168) : origin]
        image = png(forecast_figure(start, quantiles, config, past=known, holds=is_held))
        forecast = HourlySeries.from_rows(times, columns, "forecast")
        forecast.write_csv(out / "forecast.csv", local_zone=config.time_zone)
        write_whole(out / "forecast.png", image)
    console.print(told, highlight=False)
    console.print(f"forecast from {start} UTC: wrote {out / 'forecast.csv'} and forecast.png")


@commands.command()
def results() -> None:
    """Print the README's tables from results/*.json."""
    from examples.energy_forecasting.summary import markdown

    click.echo(markdown(), nl=False)
