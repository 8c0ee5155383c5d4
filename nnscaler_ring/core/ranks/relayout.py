"""Rows between two layouts of the same tokens (contiguous <-> zigzag), whoever holds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from nnscaler_ring.core.plan.moves import Moves, Run
from nnscaler_ring.core.ranks.transport import Message, Transport

RUNS_APART = 2
"""So many runs to a rank are messages of their own, without a copy where they are one piece; more,
as of many documents, are packed into one: NCCL may hang in a post of a thousand messages."""


def move_rows(
    tensors: Sequence[tuple[Tensor, int]], moves: Moves, transport: Transport
) -> list[Tensor]:
    """Tensors with their rows along `dim` in the target layout: fresh, contiguous, moved together.

    Args:
        tensors: (tensor, dim) with this rank's rows of the source layout.
    """
    results: list[Tensor] = []
    sends: list[Message] = []
    receives: list[Message] = []
    arrivals: list[tuple[Tensor, Tensor]] = []
    for x, dim in tensors:
        moved = x.new_empty(*x.shape[:dim], moves.new_length, *x.shape[dim + 1 :])
        results.append(moved)
        for block, pieces in _by_block(x, dim, moves.sends):
            if len(pieces) > RUNS_APART:
                pieces = [torch.cat(pieces, dim)]
            sends += [Message(block, rows.contiguous()) for rows in pieces]
        for block, pieces in _by_block(moved, dim, moves.receives):
            if len(pieces) > RUNS_APART:
                lengths = [rows.shape[dim] for rows in pieces]
                packed = x.new_empty(*x.shape[:dim], sum(lengths), *x.shape[dim + 1 :])
                receives.append(Message(block, packed))
                arrivals += zip(pieces, packed.split(lengths, dim), strict=True)
                continue
            for rows in pieces:
                # A run that is one piece of memory is received where it belongs, without a copy.
                buffer = rows if rows.is_contiguous() else rows.new_empty(rows.shape)
                receives.append(Message(block, buffer))
                arrivals.append((rows, buffer))
    transfer = transport.post("relayout", sends, receives)
    for (x, dim), moved in zip(tensors, results, strict=True):
        before = (slice(None),) * dim
        for old, new in moves.kept:
            moved[(*before, new)] = x[(*before, old)]
    transfer.wait()
    for rows, buffer in arrivals:
        if buffer is not rows:
            rows.copy_(buffer)
    return results


def _by_block(x: Tensor, dim: int, runs: Sequence[Run]) -> Iterator[tuple[int, list[Tensor]]]:
    """(block, the rows of its runs, as views) for every block, whose runs lie together."""
    before = (slice(None),) * dim
    for block, some in groupby(runs, key=lambda run: run.block):
        yield block, [x[(*before, run.rows)] for run in some]
