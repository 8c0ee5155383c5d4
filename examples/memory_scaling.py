"""Memory per rank is O(tokens / ranks): real gloo processes, strong and weak scaling.

    python examples/memory_scaling.py                # ranks 1, 2, 4, 8; minutes on two cores

Every rank is a process of its own that calls `wrap_zigzag_attn_func`, forward and backward. Counted
are the bytes of its tensors (torch's profiler), and beside them the peak of resident memory; with
--device cuda, one GPU a rank, the peak of torch's allocator stands for both. For
contrast the all-gather exchange, and replicated queries, which no exchange of
ours does: one device's tensors for them, forward only, are made and counted here.
What it shows: memory per rank is a + b * tokens / ranks. What it does not show: time, GPUs.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from nnscaler_ring import wrap_zigzag_attn_func
from nnscaler_ring.core.kernels import Problem, select_kernel
from nnscaler_ring.core.scores.scores import TileScores
from nnscaler_ring.core.sums.online_softmax import PartialOutput
from nnscaler_ring.simulator.live_bytes import LiveBytes
from nnscaler_ring.tools.demo.memory import count_tensor_bytes, peak_memory
from nnscaler_ring.tools.launch import Rank, check_ranks, run_ranks
from nnscaler_ring.tools.machine import origin

MIB = 2**20
HEADS, HEAD_DIM = 2, 64
ROW_BYTES = HEADS * HEAD_DIM * 4


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--tokens", type=int, default=32768, help="of strong scaling")
    parser.add_argument("--tokens-per-rank", type=int, default=4096, help="of weak scaling")
    parser.add_argument(
        "--within",
        type=float,
        default=0.15,
        help="largest relative residual of the fit; shards as short as a message need more, "
        "because a rank with one peer has fewer messages under way",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("memory_scaling"))
    args = parser.parse_args()
    try:
        for ranks in args.ranks:
            check_ranks(ranks, args.device)
    except ValueError as error:
        parser.error(str(error))
    return args


def attend(rank: Rank, tokens: int, exchange: str) -> None:
    """This rank's share of one causal attention, forward and backward."""
    shape = 1, tokens // rank.world_size, HEADS, HEAD_DIM
    q, k, v, dout = (torch.randn(shape, device=rank.device) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_()
    group = rank.group if rank.world_size > 1 else None
    out = wrap_zigzag_attn_func(q, k, v, process_group=group, layout="zigzag", exchange=exchange)
    out.backward(dout)


def measure(rank: Rank, tokens: int, exchange: str) -> tuple[int, int]:
    """(counted bytes of tensors, peak of resident memory above the level before)."""
    attend(rank, 64 * rank.world_size, exchange)  # loads what the first call loads
    with peak_memory(rank.device) as peak:
        attend(rank, tokens, exchange)
    if rank.device.type == "cuda":
        return peak.bytes, peak.bytes
    return count_tensor_bytes(lambda: attend(rank, tokens, exchange)).peak, peak.bytes


def replicated_queries(tokens: int, ranks: int, device: str) -> int:
    """Counted bytes of a forward pass whose device holds all queries and one shard of K and V."""
    sizes = HEADS, HEADS, HEAD_DIM, HEAD_DIM
    kernel = select_kernel("auto", Problem(device, torch.float32, *sizes))
    with LiveBytes() as meter:
        q = torch.randn(1, tokens, HEADS, HEAD_DIM, device=device)
        partial = PartialOutput(q, HEAD_DIM)
        for _ in range(min(2, ranks)):  # later shards take the place of these
            shape = 1, tokens // ranks, HEADS, HEAD_DIM
            k, v = (torch.randn(shape, device=device) for _ in range(2))
            block = kernel.forward(q, k, v, TileScores(1.0))
            partial.merge_(slice(0, tokens), *block)
    return meter.peak.total()


def fit(rows: list[dict[str, Any]], name: str) -> tuple[float, float, float]:
    """(a, b, largest relative residual) of bytes = a + b * (bytes of a rank's q), by least squares.

    One rank alone exchanges nothing and is left out.
    """
    some = [row for row in rows if row["ranks"] > 1]
    x = torch.tensor([[1.0, row["tokens"] / row["ranks"] * ROW_BYTES] for row in some]).double()
    y = torch.tensor([float(row[name]) for row in some]).double()
    solution = torch.linalg.lstsq(x, y.unsqueeze(1)).solution.squeeze(1)
    residual = float(((x @ solution - y).abs() / y).max())
    return float(solution[0]), float(solution[1]), residual


def draw(path: Path, rows: list[dict[str, Any]], line: tuple[float, float]) -> None:
    """Counted bytes against a rank's share, with the fitted line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for kind in dict.fromkeys(row["kind"] for row in rows):
        some = [row for row in rows if row["kind"] == kind]
        shares = [row["tokens"] / row["ranks"] for row in some]
        axes.plot(shares, [row["counted_bytes"] / MIB for row in some], "o--", label=kind, lw=0.6)
    shares = sorted({row["tokens"] / row["ranks"] for row in rows})
    a, b = line
    axes.plot(
        shares, [(a + b * s * ROW_BYTES) / MIB for s in shares], "k-", label="a + b tokens/ranks"
    )
    axes.set_xlabel("tokens per rank")
    axes.set_ylabel("peak of tensors, MiB per rank")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    args = arguments()
    console = Console()
    strong = [("direct, strong", args.tokens, n, "direct") for n in args.ranks]
    weak = [("direct, weak", args.tokens_per_rank * n, n, "direct") for n in args.ranks]
    gathered = [("all_gather, strong", args.tokens, n, "all_gather") for n in args.ranks if n > 1]
    rows: list[dict[str, Any]] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("ranks", total=len(strong + weak + gathered))
        for kind, tokens, ranks, exchange in strong + weak + gathered:
            results = run_ranks(
                ranks, measure, tokens, exchange, device=args.device, timeout_seconds=600.0
            )
            counted, resident = (max(figures) for figures in zip(*results, strict=True))
            rows.append(
                {
                    "kind": kind,
                    "ranks": ranks,
                    "tokens": tokens,
                    "counted_bytes": counted,
                    "resident_bytes": resident,
                }
            )
            progress.advance(task)
    for ranks in args.ranks:
        counted = replicated_queries(args.tokens, ranks, args.device)
        rows.append(
            {
                "kind": "replicated queries, forward",
                "ranks": ranks,
                "tokens": args.tokens,
                "counted_bytes": counted,
                "resident_bytes": None,
            }
        )
    table = Table("what", "ranks", "tokens", "tensors, MiB", "resident, MiB")
    for row in rows:
        resident = row["resident_bytes"]
        table.add_row(
            row["kind"],
            str(row["ranks"]),
            str(row["tokens"]),
            f"{row['counted_bytes'] / MIB:.1f}",
            "" if resident is None else f"{resident / MIB:.1f}",
        )
    console.print(table)
    direct = [row for row in rows if row["kind"].startswith("direct")]
    a, b, residual = fit(direct, "counted_bytes")
    is_linear = b > 0 and residual <= args.within
    verdict = "O(tokens / ranks)" if is_linear else "NOT a line in tokens / ranks"
    console.print(
        f"direct: {a / MIB:.1f} MiB + {b:.2f} x a rank's q, within {residual:.1%}: {verdict}",
        highlight=False,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    line = {"a_bytes": a, "b_of_q": b, "largest_residual": residual}
    record = origin(["python", *sys.argv], args.device) | {"rows": rows, "fit": line}
    (args.out / "memory_scaling.json").write_text(json.dumps(record, indent=2) + "\n")
    draw(args.out / "memory_scaling.png", rows, (a, b))
    console.print(f"wrote {args.out}/memory_scaling.json and .png", highlight=False)
    if not is_linear:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
