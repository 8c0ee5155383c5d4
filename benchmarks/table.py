"""Tables from result rows: markdown for documents, rich for the terminal.

python benchmarks/table.py benchmarks/results/NAME.jsonl
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text

# Run as a file, Python looks for packages beside it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rows import Row, read_rows

MIB = 2**20


@dataclass(frozen=True)
class Table:
    """Text in rows and columns."""

    title: str
    header: tuple[str, ...]
    lines: list[tuple[str, ...]]

    def markdown(self) -> str:
        """As GitHub renders it."""
        lines = [self.header, tuple("---" for _ in self.header), *self.lines]
        rendered = ["| " + " | ".join(line) + " |" for line in lines]
        return "\n".join([f"**{self.title}**", "", *rendered])

    def rich(self) -> RichTable:
        """For a terminal."""
        header = (Column(Text(name)) for name in self.header)
        shown = RichTable(*header, title=Text(self.title), title_justify="left")
        for line in self.lines:
            shown.add_row(*map(Text, line))
        return shown


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """One table per part, and per case where a part has several."""
    for (part, case), some in _grouped(rows, _case).items():
        header, line = COLUMNS[part]
        yield Table(f"{part}: {case}", header, [line(row) for row in some])


def provenance(rows: Sequence[Row]) -> Iterator[str]:
    """A line per command, commit and device that the rows come from."""
    for (command, commit, cpu, cores, torch), some in _grouped(rows, _origin).items():
        dirty = " (with uncommitted changes)" if any(row["dirty"] for row in some) else ""
        yield (
            f"`{command}`, commit {commit[:12]}{dirty}, torch {torch}, {cpu}, {cores} cores, "
            f"{some[0]['date']} to {some[-1]['date']}"
        )


def _grouped(rows: Sequence[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _case(row: Row) -> tuple[str, str]:
    case = row["parameters"].get("work") or WITHOUT_WORK[row["part"]]
    if row["part"] == "bytes":
        case += f", {row['parameters']['processes']} ranks"
    return row["part"], case


def _origin(row: Row) -> tuple[Any, ...]:
    device = row["device"]
    commit = row["commit"] or "unknown"
    name = device.get("name", device["cpu"])
    return row["command"], commit, name, device["cores"], row["versions"]["torch"]


def _seconds(row: Row) -> tuple[str, str]:
    seconds = row["seconds"]
    if seconds is None:
        return "-", "-"
    spread = f"{1e3 * seconds['min']:.1f}-{1e3 * seconds['max']:.1f}"
    return f"{1e3 * seconds['median']:.1f}", spread


def _other_cores(row: Row) -> str:
    cores = row["results"]["other_cores_busy"]
    return "-" if cores is None else f"{cores:.2f}"


def _speed_line(row: Row) -> tuple[str, ...]:
    results = row["results"]
    kept = [
        f"{one['of_medians']:.2f} [{one['by_round_median']:.2f}]"
        for one in results["kept_fraction"].values()
    ]
    difference = results["relative_l2_to_baseline"]
    worst = f"{max(difference.values()):.1e}" if difference else ""
    baseline = "op" not in row["parameters"]
    shown = "" if baseline else " / ".join(kept)
    return (row["name"], *_seconds(row), shown, worst, _other_cores(row))


def _bytes_line(row: Row) -> tuple[str, ...]:
    cells = [row["name"]]
    for results in (row["results"]["forward"], row["results"]["forward_and_backward"]):
        ratio = results["ratio"]
        cells += [
            f"{max(results['sent_bytes_by_rank']) / MIB:.3f}",
            "-" if ratio is None else f"{ratio:.2f}",
            f"{max(results['relayout_bytes_by_rank']) / MIB:.3f}",
        ]
    return tuple(cells)


def _memory_line(row: Row) -> tuple[str, ...]:
    worst = row["results"]["worst_rank_in_local_q"]
    ranges = [("counted_at_least", "counted"), ("rss_mmap",) * 2, ("rss_default",) * 2]
    figures = [
        f"{_range(worst[low], worst[high])} "
        f"({_range(worst[low] - worst['gradient'], worst[high] - worst['gradient'])})"
        for low, high in ranges
    ]
    mib = max(one["counted_bytes"] for one in row["results"]["by_rank"]) / MIB
    return (row["name"], str(row["parameters"]["processes"]), *figures, f"{mib:.0f}")


def _range(low: float, high: float) -> str:
    shown = f"{low:.1f}", f"{high:.1f}"
    return shown[0] if shown[0] == shown[1] else "-".join(shown)


def _memory_scaling_line(row: Row) -> tuple[str, ...]:
    busiest = max(row["results"]["peak_bytes_by_rank"])
    scores = row["results"]["computed_score_matrix_bytes"]
    tokens, ranks = (str(row["parameters"][name]) for name in ("tokens", "ranks"))
    return tokens, ranks, f"{busiest / MIB:.0f}", f"{scores / MIB:.0f}"


def _one_device_line(row: Row) -> tuple[str, ...]:
    results = row["results"]
    times = (f"{1e3 * results[name]:.1f}" for name in ("ours_seconds", "sdpa_seconds"))
    return row["name"], *times, f"{results['ratio']:.2f}"


def _cpu_tiles_line(row: Row) -> tuple[str, ...]:
    results, parameters = row["results"], row["parameters"]
    conditions = f"{parameters['instruction_set']}, MKL {parameters['mkl']}"
    shown = ", ".join(
        f"{name.replace('_', ' ')} {value:.2f}"
        for name, value in results.items()
        if isinstance(value, float) and name != "load_average"
    )
    return row["name"], conditions, shown, f"{results['load_average']:.0f}"


def _peers_line(row: Row) -> tuple[str, ...]:
    if row["error"]:
        return (row["name"], "-", "-", row["error"].replace("|", "\\|"), "-")
    errors = row["results"]["relative_l2_to_float64"]
    shown = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return (row["name"], *_seconds(row), shown, _other_cores(row))


def _dilated_line(row: Row) -> tuple[str, ...]:
    results = row["results"]
    mib = max(results["sent_bytes_by_rank"]) / MIB
    of_dense = (results["seconds_of_dense"], results["bytes_of_dense"])
    ratios = ("-" if ratio is None else f"{ratio:.3f}" for ratio in of_dense)
    return (row["name"], *_seconds(row), f"{mib:.3f}", *ratios, _other_cores(row))


def _replay_line(row: Row) -> tuple[str, ...]:
    results = row["results"]
    if row["error"]:
        return (row["name"], row["error"], *("-",) * 6)
    return (
        row["name"],
        results["kernel"],
        *_seconds(row),
        f"{results['kernel_tflops_per_second']:.3g}",
        f"{results['kept_fraction']:.3f}",
        f"{results['merge']['least_bytes_per_second'] / 1e9:.0f}",
        f"{results['modelled_communication']['largest_share_of_compute']:.1%}",
    )


CPU_TILES = ("case", "ours, MKL", "CPU time of torch_cpu / cpu_tiles, or kept", "load average")
WITHOUT_WORK = {
    "cpu_tiles_one_thread": "causal, one thread, our op with either kernel",
    "cpu_tiles_two_threads": "causal, wall time with one thread / with two",
    "cpu_tiles_two_ranks": "zigzag order, kept fraction of two ranks",
    "memory_scaling": "one RingAttention(512, 8) layer",
    "one_device": "causal, 4 heads of 64, one process",
}
"""What rows are about that do not say it."""

COLUMNS: dict[str, tuple[tuple[str, ...], Callable[[Row], tuple[str, ...]]]] = {
    "cpu_tiles_one_thread": (CPU_TILES, _cpu_tiles_line),
    "cpu_tiles_two_threads": (CPU_TILES, _cpu_tiles_line),
    "cpu_tiles_two_ranks": (CPU_TILES, _cpu_tiles_line),
    "one_device": (("case", "ours, ms", "F.sdpa, ms", "median of ratios"), _one_device_line),
    "memory_scaling": (
        ("tokens", "ranks", "peak MiB, busiest rank", "scores of all heads, computed MiB"),
        _memory_scaling_line,
    ),
    "speed": (
        (
            "contestant",
            "median ms",
            "min-max ms",
            "kept: of medians [by round] / next baseline",
            "worst relative L2",
            "other cores busy",
        ),
        _speed_line,
    ),
    "bytes": (
        (
            "contestant",
            *(
                f"{passes} {what}"
                for passes in ("fwd", "fwd+bwd")
                for what in ("MiB sent by the worst rank", "sent/bound", "relayout MiB")
            ),
        ),
        _bytes_line,
    ),
    "memory": (
        (
            "contestant",
            "processes",
            "counted / local q (less dq, dk, dv)",
            "RSS / local q, mmap above 128 KiB",
            "RSS / local q, glibc default",
            "counted MiB",
        ),
        _memory_line,
    ),
    "peers": (
        ("contestant", "median ms", "min-max ms", "relative L2 to float64", "other cores busy"),
        _peers_line,
    ),
    "replay": (
        (
            "replayed",
            "kernel",
            "one device, median ms",
            "min-max ms",
            "kernel TFLOP/s",
            "kept fraction (compute only)",
            "merge GB/s",
            "modelled transfers / compute",
        ),
        _replay_line,
    ),
    "dilated": (
        (
            "contestant",
            "median ms",
            "min-max ms",
            "MiB sent by the worst rank",
            "time / dense",
            "bytes / dense",
            "other cores busy",
        ),
        _dilated_line,
    ),
}


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def main(files: tuple[Path, ...]) -> None:
    """Print markdown tables of result files."""
    rows = [row for path in files for row in read_rows(path)]
    for table in tables(rows):
        print(table.markdown(), end="\n\n")
    for line in provenance(rows):
        print(f"- {line}")


if __name__ == "__main__":
    main()
