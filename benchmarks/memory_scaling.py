"""Memory of one RingAttention layer against the length of the sequence and the size of the ring.

python benchmarks/memory_scaling.py

Forward and backward of `RingAttention(512, 8)` in float32, as the energy document has it: the peak
above weights and nothing else, on the rank that needs most, in fresh processes. Beside it stands
what the score matrices of textbook attention would take, which is arithmetic and marked so.
"""

import sys
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

# Run as a file, Python looks for packages beside it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rows import make_row, write_rows
from nnscaler_ring.models import RingAttention, even_shard_lens
from nnscaler_ring.tools.demo.memory import peak_memory
from nnscaler_ring.tools.launch import Rank, run_ranks

D_MODEL, HEADS = 512, 8
WARM_UP_TOKENS = 64
MIB = 2**20


def layer_memory(rank: Rank, tokens: int) -> tuple[int, str]:
    """(bytes, method) of this rank's share of one layer."""
    group = rank.group if rank.world_size > 1 else None
    torch.manual_seed(0)
    layer = RingAttention(D_MODEL, HEADS, process_group=group)
    _pass(layer, rank, WARM_UP_TOKENS * rank.world_size)  # loads what the first call loads
    with peak_memory(rank.device) as peak:
        _pass(layer, rank, tokens)
    return peak.bytes, peak.method


def _pass(layer: RingAttention, rank: Rank, tokens: int) -> None:
    lens = even_shard_lens(tokens, layer.process_group)
    x = torch.randn(1, lens[rank.rank], D_MODEL, requires_grad=True)
    layer(x, lens).sum().backward()


def score_matrix_bytes(tokens: int) -> int:
    """Float32 scores of all heads at once: what textbook attention keeps, once."""
    return 4 * HEADS * tokens * tokens


@click.command()
@click.option("--tokens", multiple=True, default=(1000, 8760, 35_040), show_default=True, type=int)
@click.option("--ranks", multiple=True, default=(1, 2, 4), show_default=True, type=int)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Append JSON lines.")
def main(tokens: tuple[int, ...], ranks: tuple[int, ...], out: Path | None) -> None:
    """Measure, print a table, and append a row per length and ring size to --out."""
    table = Table("tokens", "scores, computed", *(f"{count} ranks, MiB" for count in ranks))
    for length in tokens:
        cells = []
        for count in ranks:
            peaks = run_ranks(count, layer_memory, length, timeout_seconds=600)
            busiest = max(peak for peak, _ in peaks)
            cells.append(f"{busiest / MIB:.0f}")
            row = make_row(
                "memory_scaling",
                f"RingAttention, {length} tokens, {count} ranks",
                {"tokens": length, "ranks": count, "d_model": D_MODEL, "n_heads": HEADS},
                results={
                    "peak_bytes_by_rank": [peak for peak, _ in peaks],
                    "method": peaks[0][1],
                    "computed_score_matrix_bytes": score_matrix_bytes(length),
                },
            )
            if out is not None:
                write_rows(out, [row])
        table.add_row(f"{length}", f"{score_matrix_bytes(length) / MIB:.0f} MiB", *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
