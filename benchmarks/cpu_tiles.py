"""The C++ CPU kernel beside torch's fused one, in the same op and the same run.

python benchmarks/cpu_tiles.py
python benchmarks/cpu_tiles.py --preload --part one_thread
ATEN_CPU_CAPABILITY=avx2 python benchmarks/cpu_tiles.py --instruction-set avx2 --part one_thread

Repetitions of both kernels take turns on the same tensors. The figure is the median over the
repetitions of the ratio of their CPU times, which other load on the machine disturbs less than
wall time; both are kept. `--preload` lets MKL, which multiplies for torch's kernel, take an AMD
processor for one of its own vendor's: what torch's kernel would do if MKL ran at full speed.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

# Run as a file, Python looks for packages beside it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.processes import Processes, Worker, prepare
from benchmarks.rows import Row, make_row, write_rows
from nnscaler_ring import wrap_ring_attn_func, wrap_zigzag_attn_func
from nnscaler_ring.core.kernels import cpu_tiles
from nnscaler_ring.core.kernels.native.library import Library, library
from nnscaler_ring.core.plan.tile import Tile

PRELOADED = "NNSCALER_RING_BENCH_PRELOADED"
PARTS = ("one_thread", "two_threads", "two_ranks")


@dataclass(frozen=True)
class Case:
    """One causal call; `option` is a score option, or None."""

    tokens: int
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 64
    dtype: str = "float32"
    window: int | None = None
    option: str | None = None

    @property
    def name(self) -> str:
        """For tables."""
        more = [f"window {self.window}"] if self.window else []
        more += [self.option] if self.option else []
        heads = f"{self.heads}:{self.kv_heads} x {self.head_dim}"
        return ", ".join([f"{self.tokens} {self.dtype}", heads, *more])

    def tensors(self) -> list[Tensor]:
        """q, k, v that want gradients, and dout."""
        generator = torch.Generator().manual_seed(self.tokens)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        *qkv, dout = (
            torch.randn(1, self.tokens, n, self.head_dim, generator=generator).to(
                getattr(torch, self.dtype)
            )
            for n in heads
        )
        return [*(x.requires_grad_() for x in qkv), dout]

    def options(self) -> dict[str, Any]:
        """Keywords of the public function."""
        values: dict[str, dict[str, Any]] = {
            "softcap": {"softcap": 30.0},
            "alibi": {"alibi_slopes": torch.linspace(0.01, 0.5, self.heads)},
            "bias": {"bias": torch.zeros(1, self.heads, self.tokens, self.tokens)},
            "dropout": {"dropout_p": 0.1, "dropout_seed": 1},
        }
        window = {"window_size": (self.window - 1, 0)} if self.window else {}
        return window | values.get(self.option or "", {})

    def flops(self) -> float:
        """Of a forward pass: two products of every visible pair."""
        lo = 1 - self.window if self.window else -(1 << 60)
        pairs = Tile(0, self.tokens, 0, self.tokens, lo, 0).pairs()
        return 4.0 * self.head_dim * self.heads * pairs


CASES = [
    Case(1024),
    Case(4096),
    Case(16384, 1, 1),
    Case(4096, 8, 2),
    Case(4096, 2, 2, 128),
    Case(4096, window=512),
    *(Case(2048, 2, 2, option=option) for option in ("softcap", "alibi", "bias", "dropout")),
]
RANK_CASES = [Case(4096, 2, 2), Case(16384, 1, 1)]


def both_dtypes(cases: list[Case]) -> list[Case]:
    return [replace(case, dtype=dtype) for dtype in ("float32", "bfloat16") for case in cases]


Passes = tuple[tuple[float, float], tuple[float, float]]
"""(wall, CPU) seconds of the forward pass, and of the backward pass."""


def timed(attention: Callable[..., Tensor], tensors: list[Tensor]) -> Passes:
    *qkv, dout = tensors
    marks = [(time.perf_counter(), time.process_time())]
    out = attention(*qkv)
    marks.append((time.perf_counter(), time.process_time()))
    torch.autograd.grad(out, qkv, dout)
    marks.append((time.perf_counter(), time.process_time()))
    first, second = ((marks[n + 1][0] - marks[n][0], marks[n + 1][1] - marks[n][1]) for n in (0, 1))
    return first, second


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of one process, in the public layout."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


def figures(runs: dict[str, list[Passes]], case: Case) -> dict[str, Any]:
    """Ratios of the first contestant's CPU time to the second's, and GFLOP/s of CPU time."""
    theirs, ours = runs.values()

    def ratio(seconds: Callable[[Passes], float]) -> float:
        pairs = zip(theirs, ours, strict=True)
        return statistics.median(seconds(x) / seconds(y) for x, y in pairs)

    def rates(found: list[Passes]) -> list[float]:
        return [
            factor * case.flops() / 1e9 / statistics.median(run[n][1] for run in found)
            for n, factor in ((0, 1.0), (1, 2.5))
        ]

    return {
        "forward_cpu_ratio": ratio(lambda run: run[0][1]),
        "backward_cpu_ratio": ratio(lambda run: run[1][1]),
        "both_cpu_ratio": ratio(lambda run: run[0][1] + run[1][1]),
        "both_wall_ratio": ratio(lambda run: run[0][0] + run[1][0]),
        "gflops_of_cpu_time": {name: rates(found) for name, found in runs.items()},
        "runs": {name: list(found) for name, found in runs.items()},
    }


def one_process(case: Case, reps: int, threads: int) -> dict[str, Any]:
    """Our op with either kernel."""
    torch.set_num_threads(threads)
    tensors, options = case.tensors(), case.options()
    runs: dict[str, list[Passes]] = {"torch_cpu": [], "cpu_tiles": []}
    for _ in range(reps + 1):
        for kernel, found in runs.items():
            found.append(
                timed(
                    lambda *qkv, k=kernel: wrap_ring_attn_func(*qkv, kernel=k, **options), tensors
                )
            )
    return figures({name: found[1:] for name, found in runs.items()}, case)


def thread_gain(case: Case, reps: int) -> dict[str, Any]:
    """Wall time of our kernel with one thread over that with two."""
    tensors = case.tensors()
    runs: dict[int, list[Passes]] = {1: [], 2: []}
    for _ in range(reps + 1):
        for threads, found in runs.items():
            torch.set_num_threads(threads)
            found.append(timed(lambda *qkv: wrap_ring_attn_func(*qkv, kernel="cpu_tiles"), tensors))
    one, two = ([sum(p[0] for p in run) for run in found[1:]] for found in runs.values())
    gain = statistics.median(x / y for x, y in zip(one, two, strict=True))
    return {"both_wall_ratio": gain, "runs": {str(n): found[1:] for n, found in runs.items()}}


def rank_run(worker: Worker, case: Case, kernel: str | None) -> Callable[[], Any]:
    """This rank's part of a zigzag call; without a kernel, one process of torch's attention."""
    tensors = [x.detach() for x in case.tensors()]
    if kernel is None:
        whole = [*(x.requires_grad_() for x in tensors[:3]), tensors[3]]
        return lambda: timed(sdpa, whole)
    chunk, last = case.tokens // (2 * worker.world_size), 2 * worker.world_size - 1
    mine = [
        torch.cat([x[:, n * chunk : (n + 1) * chunk] for n in (worker.rank, last - worker.rank)], 1)
        for x in tensors
    ]
    mine = [*(x.requires_grad_() for x in mine[:3]), mine[3]]
    group = list(range(worker.world_size))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = wrap_zigzag_attn_func(
            q, k, v, process_group=group, layout="zigzag", kernel=kernel
        )
        return out

    return lambda: timed(attention, mine)


def run_prepared(worker: Worker, name: str) -> Any:
    return worker.prepared[name]()


def two_ranks(case: Case, reps: int) -> dict[str, Any]:
    """Kept fractions, by CPU time: one process of torch's attention over the ranks' sum."""
    runs: dict[str, list[Any]] = {"sdpa": [], "torch_cpu": [], "cpu_tiles": []}
    with Processes(2) as ranks, Processes(1, threads=2) as single:
        for name in runs:
            where, kernel = (single, None) if name == "sdpa" else (ranks, name)
            where.call(prepare, name, rank_run, case, kernel)
        for _ in range(reps + 1):
            for name, found in runs.items():
                found.append((single if name == "sdpa" else ranks).call(run_prepared, name))
    runs = {name: found[1:] for name, found in runs.items()}

    def kept(name: str, clock: int) -> float:
        def cost(of_ranks: list[Passes]) -> float:
            spent = [sum(one_pass[clock] for one_pass in passes) for passes in of_ranks]
            # Cores are busy as long as the slowest rank; CPU seconds of one process are of two.
            return max(spent) * (2 if clock and len(spent) > 1 else 1)

        rounds = zip(runs["sdpa"], runs[name], strict=True)
        return statistics.median(cost(one) / cost(other) for one, other in rounds)

    return {
        f"kept_{clock}_{name}": kept(name, number)
        for name in ("torch_cpu", "cpu_tiles")
        for number, clock in enumerate(("wall", "cpu"))
    } | {"runs": runs}


def rows_of(part: str, cases: list[Case], reps: int, found: Library) -> Iterator[Row]:
    parameters = {
        "repetitions": reps,
        "instruction_set": found.instruction_set,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "mkl": "preloaded" if PRELOADED in os.environ else "as it is",
    }
    for case in cases:
        match part:
            case "one_thread":
                results = one_process(case, reps, threads=1)
            case "two_threads":
                results = thread_gain(case, reps)
            case _:
                results = two_ranks(case, reps)
        results["load_average"] = os.getloadavg()[0]
        yield make_row(f"cpu_tiles_{part}", case.name, parameters | asdict(case), results=results)


def take_instruction_set(name: str | None) -> Library:
    found = library(name)
    if isinstance(found, str):
        raise SystemExit(f"no cpu_tiles: {found}")
    cpu_tiles.library = lambda: found  # type: ignore[assignment,misc]
    return found


def run_preloaded() -> None:
    """This program again, in a process where MKL asks a function of ours for the vendor."""
    with tempfile.TemporaryDirectory() as folder:
        source, library_file = Path(folder) / "vendor.c", Path(folder) / "vendor.so"
        source.write_text("int mkl_serv_intel_cpu_true(void) { return 1; }\n")
        subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library_file], check=True)
        environment = os.environ | {"LD_PRELOAD": str(library_file), PRELOADED: "1"}
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)


@click.command()
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), default=PARTS)
@click.option("--repetitions", default=7, show_default=True, type=click.IntRange(1))
@click.option("--cases", multiple=True, help="Only cases that have this in their name.")
@click.option("--instruction-set", help="For our kernel; see build.py beside it.")
@click.option("--preload", is_flag=True, help="With MKL's vendor check answered yes.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Append JSON lines.")
def main(
    parts: tuple[str, ...],
    repetitions: int,
    cases: tuple[str, ...],
    instruction_set: str | None,
    preload: bool,
    out: Path | None,
) -> None:
    """Measure, print a table, and append a row per case to --out."""
    if preload and PRELOADED not in os.environ:
        run_preloaded()
    found = take_instruction_set(instruction_set)
    for part in parts:
        of_part = CASES if part == "one_thread" else RANK_CASES
        chosen = [c for c in both_dtypes(of_part) if not cases or any(x in c.name for x in cases)]
        table = Table("case", "figures", title=part)
        for row in rows_of(part, chosen, repetitions, found):
            shown = {k: v for k, v in row["results"].items() if isinstance(v, float)}
            table.add_row(row["name"], ", ".join(f"{k} {v:.2f}" for k, v in shown.items()))
            if out is not None:
                write_rows(out, [row])
        Console(width=200).print(table)


if __name__ == "__main__":
    main()
