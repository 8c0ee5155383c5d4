"""Exact attention of sampled queries over a hundred million keys, at constant memory.

    python examples/exact_rows.py                       # 64 queries, 1e8 keys
    python examples/exact_rows.py --keys 1000000000     # a billion: ten times as long

Keys and values are made from their 64-bit place, streamed through the attention kernel and merged
in float32; one of the queries is also computed in float64. What it shows: dense attention rows over
a length that nobody holds, exact, in memory that does not grow. What it does not show: the other
rows. All of them would take the square.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from nnscaler_ring.core.kernels import select_kernel
from nnscaler_ring.core.scores.scores import TileScores
from nnscaler_ring.core.sums.online_softmax import PartialOutput
from nnscaler_ring.simulator import GeneratedInputs, Sizes
from nnscaler_ring.simulator.live_bytes import LiveBytes
from nnscaler_ring.simulator.planner import gigabytes
from nnscaler_ring.simulator.sampled_rows import exact_rows
from nnscaler_ring.tools.machine import check_device, origin


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keys", type=int, default=100_000_000)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--head-dim", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=1 << 16, help="keys at a time")
    parser.add_argument("--checked", type=int, default=1, help="queries also done in float64")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    try:
        check_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> None:
    args = arguments()
    sizes = Sizes(1, 1, args.head_dim, args.head_dim)
    inputs = GeneratedInputs(sizes, device=args.device)
    kernel = select_kernel(args.kernel, sizes.problem(args.device))
    scale = args.head_dim**-0.5
    queries = torch.linspace(0, args.keys - 1, args.queries, dtype=torch.float64).long()
    console = Console()
    console.print(f"[bold]{args.queries} exact rows over {args.keys:,} keys[/]", highlight=False)
    start = time.monotonic()
    with LiveBytes() as meter, Progress(console=console, transient=True) as progress:
        task = progress.add_task("keys", total=args.keys)
        q = inputs.rows("q", queries)
        partial = PartialOutput(q, args.head_dim)
        everything = slice(0, args.queries)
        for first in range(0, args.keys, args.chunk):
            tokens = torch.arange(first, min(first + args.chunk, args.keys))
            k, v = inputs.rows("k", tokens), inputs.rows("v", tokens)
            block = kernel.forward(q, k, v, TileScores(scale))
            partial.merge_(everything, *block)
            progress.advance(task, len(tokens))
        out, _ = partial.current()
    seconds = time.monotonic() - start
    checked = torch.arange(args.checked)
    wanted, _ = exact_rows(inputs, queries[checked], scale, 0, args.keys)
    error = float((out[:, checked].double() - wanted).norm() / wanted.norm())
    figures = {
        "keys": args.keys,
        "queries": args.queries,
        "head_dim": args.head_dim,
        "peak_bytes": meter.peak.total(),
        "seconds": seconds,
        "keys_per_second": args.keys / seconds,
        "checked_in_float64": args.checked,
        "relative_error": error,
        "kernel": kernel.name,
    }
    for name, value in figures.items():
        console.print(f"{name:>20}  {value}", highlight=False)
    console.print(f"peak memory {gigabytes(meter.peak.total())}", highlight=False)
    if args.out:
        record = origin(["python", *sys.argv], args.device) | figures
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
