"""Time of our op in one process beside F.scaled_dot_product_attention: the op without ranks.

python benchmarks/one_device.py

Less than twice the time of SDPA is allowed. One process, causal, interleaved repetitions;
the figure is the median of the repetitions' own ratios, so that a machine that slows down during
the run slows both.
"""

import statistics
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

# Run as a file, Python looks for packages beside it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rows import make_row, write_rows
from nnscaler_ring import wrap_zigzag_attn_func

HEADS, HEAD_DIM = 4, 64
LIMIT = 2.0


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[1, tokens, heads, head_dim], as the op takes it."""
    out: Tensor = wrap_zigzag_attn_func(q, k, v)
    return out


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same from the same tensors."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


def seconds(attention: Callable[..., Tensor], tensors: list[Tensor], backward: bool) -> float:
    """Of one pass, or of both."""
    start = time.perf_counter()
    out = attention(*tensors[:3])
    if backward:
        torch.autograd.grad(out, tensors[:3], tensors[3])
    return time.perf_counter() - start


@click.command()
@click.option("--tokens", multiple=True, default=(2048, 8192), show_default=True, type=int)
@click.option("--repetitions", default=7, show_default=True, type=click.IntRange(1))
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Append JSON lines.")
def main(tokens: tuple[int, ...], repetitions: int, out: Path | None) -> None:
    """Measure, print a table, and append a row per case to --out."""
    table = Table("tokens", "dtype", "passes", "ours, ms", "F.sdpa, ms", "ratio")
    highest = 0.0
    dtypes = torch.float32, torch.bfloat16
    for length, dtype, backward in product(tokens, dtypes, (False, True)):
        shape = 1, length, HEADS, HEAD_DIM
        tensors = [torch.randn(shape, dtype=dtype) for _ in range(4)]
        for x in tensors[:3]:
            x.requires_grad_(backward)
        runs = [
            [seconds(attention, tensors, backward) for attention in (ours, sdpa)]
            for _ in range(repetitions + 1)
        ][1:]  # the first one plans and warms up
        mine, theirs = (statistics.median(run[n] for run in runs) for n in (0, 1))
        ratio = statistics.median(run[0] / run[1] for run in runs)
        highest = max(highest, ratio)
        passes = "forward + backward" if backward else "forward"
        name = str(dtype).removeprefix("torch.")
        figures = f"{mine * 1e3:.1f}", f"{theirs * 1e3:.1f}", f"{ratio:.2f}"
        table.add_row(str(length), name, passes, *figures)
        parameters = {
            "tokens": length,
            "dtype": name,
            "backward": backward,
            "heads": HEADS,
            "head_dim": HEAD_DIM,
            "repetitions": repetitions,
            "threads": torch.get_num_threads(),
        }
        results = {"ours_seconds": mine, "sdpa_seconds": theirs, "ratio": ratio, "runs": runs}
        row = make_row("one_device", f"{length} {name} {passes}", parameters, results=results)
        if out is not None:
            write_rows(out, [row])
    Console().print(table)
    if highest >= LIMIT:
        raise SystemExit(f"{highest:.2f} times F.sdpa's time; less than {LIMIT:.0f} is promised")


if __name__ == "__main__":
    main()
