"""One rank's share of a context of a billion tokens: 1 of 1000 simulated ranks, forward.

    python examples/one_share_of_a_billion.py                     # sliding window, minutes on a CPU
    python examples/one_share_of_a_billion.py --pattern dilated
    python examples/one_share_of_a_billion.py --all-shares --device cuda --heads 1 --head-dim 64

What it shows: the real schedule of 1000 ranks, the real engine and kernels for one of them, its
peak memory, and that sampled rows are exact. What it does not show: a billion tokens processed
(unless --all-shares, then one head of one layer, forward, one share after another), messages
between machines, or the time that 1000 devices would take.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from nnscaler_ring.core.plan.schedule import CAUSAL, Window
from nnscaler_ring.core.sums.online_softmax import merge_
from nnscaler_ring.simulator import GeneratedInputs, RingAttentionSimulator, SimulatedCall, Sizes
from nnscaler_ring.simulator.dilated_branch import DilatedBranch, longnet_branches
from nnscaler_ring.simulator.live_bytes import LiveBytes
from nnscaler_ring.simulator.planner import gigabytes
from nnscaler_ring.simulator.sampled_rows import exact_rows
from nnscaler_ring.tools.machine import check_device, origin


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1_000_000_000)
    parser.add_argument("--ranks", type=int, default=1000)
    parser.add_argument("--rank", type=int, default=617)
    parser.add_argument("--all-shares", action="store_true", help="every rank, one after another")
    parser.add_argument("--pattern", choices=("window", "dilated"), default="window")
    parser.add_argument(
        "--window", type=int, default=512, help="keys before its own that a query sees"
    )
    parser.add_argument("--segment", type=int, default=2048, help="of the densest dilated branch")
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--sampled-rows", type=int, default=16)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    try:
        check_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    return args


def calls(args: argparse.Namespace, sizes: Sizes) -> list[SimulatedCall]:
    """One call for a window; one per branch for the dilated pattern."""
    if args.pattern == "window":
        mask = Window(left=args.window, right=0)
        return [SimulatedCall(args.tokens, args.ranks, sizes, mask, kernel=args.kernel)]
    return [
        SimulatedCall(
            args.tokens,
            args.ranks,
            sizes,
            CAUSAL,
            DilatedBranch(args.tokens, args.ranks, segment, dilation),
            kernel=args.kernel,
        )
        for segment, dilation in longnet_branches(args.tokens, args.segment)
    ]


def share(
    simulators: list[RingAttentionSimulator], rank: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(out, softmax_lse) of this rank, all branches merged, and the bytes that it sent."""
    first = simulators[0].call
    start = rank * first.tokens // first.ranks
    sent = 0
    merged: tuple[torch.Tensor, torch.Tensor] | None = None
    for simulator in simulators:
        call = simulator.call
        result = simulator.rank_share(rank)
        sent += result.sent.forward_kv_bytes
        if merged is None:
            merged = result.out.float(), result.softmax_lse.float()
            continue
        rows = call.tokens_of(call.schedule.q_layout, rank) - start
        out, lse = merged[0][:, rows], merged[1][..., rows]
        merge_(out, lse, result.out, result.softmax_lse)
        merged[0][:, rows], merged[1][..., rows] = out, lse
    assert merged is not None
    return (*merged, sent)


def exact(args: argparse.Namespace, inputs: GeneratedInputs, token: int) -> torch.Tensor:
    """The row of a token in float64, straight from the definition of the pattern."""
    query, scale = torch.tensor([token]), args.head_dim**-0.5
    if args.pattern == "window":
        first = max(0, token - args.window)
        return exact_rows(inputs, query, scale, first, token + 1)[0]
    out = lse = None
    for segment, dilation in longnet_branches(args.tokens, args.segment):
        if token % dilation:
            continue
        first = token // segment * segment
        block, block_lse = exact_rows(inputs, query, scale, first, token + 1, stride=dilation)
        if out is None or lse is None:
            out, lse = block, block_lse
        else:
            merge_(out, lse, block, block_lse)
    assert out is not None
    return out


def main() -> None:
    args = arguments()
    sizes = Sizes(args.heads, args.heads, args.head_dim, args.head_dim, args.dtype)
    inputs = GeneratedInputs(sizes, device=args.device)
    simulators = [RingAttentionSimulator(call, inputs, args.device) for call in calls(args, sizes)]
    console = Console()
    ranks = range(args.ranks) if args.all_shares else [args.rank]
    what = (
        "every rank's share in turn" if args.all_shares else f"one rank's share (rank {args.rank})"
    )
    console.print(
        f"[bold]{what} of {args.tokens:,} tokens over {args.ranks} simulated ranks: "
        f"{args.pattern}, one layer, {args.heads} head(s) of {args.head_dim}, forward[/]",
        highlight=False,
    )
    errors: list[float] = []
    peaks: list[int] = []
    start = time.monotonic()
    for rank in track(ranks, "shares", console=console, transient=True):
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            out, _, sent = share(simulators, rank)
            peaks.append(torch.cuda.max_memory_allocated())
        else:
            with LiveBytes() as meter:
                out, _, sent = share(simulators, rank)
            peaks.append(meter.peak.total())
        begin = rank * args.tokens // args.ranks
        for row in torch.linspace(0, out.shape[1] - 1, args.sampled_rows).long().unique():
            wanted = exact(args, inputs, begin + int(row))
            ours = out[:, row : row + 1].double()
            errors.append(float((ours - wanted).norm() / wanted.norm()))
        del out
    figures = {
        "what": what,
        "tokens": args.tokens,
        "ranks": args.ranks,
        "tokens_of_a_share": args.tokens // args.ranks,
        "pattern": args.pattern,
        "shares_run": len(peaks),
        "peak_bytes": max(peaks),
        "sent_bytes": sent,
        "sampled_rows": len(errors),
        "largest_relative_error": max(errors),
        "seconds": time.monotonic() - start,
        "kernel": simulators[0].kernel.name,
    }
    for name, value in figures.items():
        console.print(f"{name:>24}  {value}", highlight=False)
    console.print(
        f"peak memory {gigabytes(max(peaks))}; {len(errors)} sampled rows within "
        f"{max(errors):.1e} of float64",
        highlight=False,
    )
    if args.out:
        record = origin(["python", *sys.argv], args.device) | figures
        args.out.write_text(json.dumps(record, indent=2) + "\n")
    if max(errors) > 1e-5 and args.dtype == "float32":
        raise SystemExit("sampled rows are WRONG")


if __name__ == "__main__":
    main()
