"""Bytes that each rank sends, counted in real calls, against what the mask makes necessary.

The lower bound knows only positions and the mask, not the package's schedule: each row of K and V
goes once to every other rank that computes a query which sees it; the backward pass needs the same
rows again and returns one gradient per row. The relayout of queries is counted apart.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.processes import Processes, Worker
from benchmarks.progress import Waiting
from benchmarks.rows import Row, make_row
from benchmarks.work import OPS, Work, held_tokens, layout_of, our_attention
from nnscaler_ring import traffic
from nnscaler_ring.core.exchange import EXCHANGES

KEYS_AND_GRADIENTS = ("forward_kv", "backward_kv", "gradient")


def works(quick: bool) -> list[Work]:
    """One per mask, and one in bfloat16."""
    causal = Work(256, 2, 2) if quick else Work(4096, 4, 4)
    masks = [
        causal,
        replace(causal, causal=False),
        replace(causal, window=causal.tokens // 16),
        replace(causal, documents=8),
    ]
    if quick:
        return masks
    return [*masks, replace(causal, num_heads=8, num_kv_heads=2), replace(causal, dtype="bfloat16")]


def run(chosen: Sequence[Work], *, world_sizes: Sequence[int], waiting: Waiting) -> Iterator[Row]:
    """A row per op, exchange, mask and number of ranks."""
    for world_size in world_sizes if chosen else ():
        with Processes(world_size) as ranks:
            for work in chosen:
                name = f"bytes, {world_size} ranks: {work.name}"
                ops = [op for op in OPS if (op == "varlen") == (work.documents > 1)]
                with waiting.task(name, len(ops) * len(EXCHANGES)) as advance:
                    for op in ops:
                        for exchange in EXCHANGES:
                            yield _row(ranks, work, op, exchange)
                            advance()


def _row(ranks: Processes, work: Work, op: str, exchange: str) -> Row:
    forward, backward = zip(*ranks.call(count_traffic, work, op, exchange), strict=True)
    both = [{name: a[name] + b[name] for name in a} for a, b in zip(forward, backward, strict=True)]
    needed = needed_bytes(work, op, ranks.size)
    given = [sum(by_owner[rank] for by_owner in needed) for rank in range(ranks.size)]
    read = [sum(by_owner) for by_owner in needed]
    results = {
        "forward": _against(forward, given),
        "forward_and_backward": _against(
            both, [2 * keys + gradients for keys, gradients in zip(given, read, strict=True)]
        ),
    }
    parameters = {**work.parameters(), "op": op, "exchange": exchange, "processes": ranks.size}
    return make_row("bytes", f"{op}, {exchange}", parameters, results=results)


def count_traffic(
    worker: Worker, work: Work, op: str, exchange: str
) -> tuple[dict[str, int], dict[str, int]]:
    """What this rank sends in the forward pass, and in the backward pass, by kind."""
    group = list(range(worker.world_size))
    rows = work.tokens // worker.world_size
    *inputs, dout = work.tensors(rows)
    inputs = [x.requires_grad_() for x in inputs]
    readings = [traffic(group)]
    out = our_attention(worker, work, op, exchange)(*inputs)
    readings.append(traffic(group))
    torch.autograd.grad(out, inputs, dout)
    readings.append(traffic(group))
    forward, backward = readings[1] - readings[0], readings[2] - readings[1]
    return vars(forward), vars(backward)


def needed_bytes(work: Work, op: str, world_size: int) -> list[list[int]]:
    """[reader][owner]: bytes of K and V of `owner` that some query of `reader` sees; 0 of its own.

    They travel from owner to reader, and their gradients, as many bytes, back.
    """
    layout = layout_of(OPS[op].compute_layout, work.tokens, world_size)
    row_bytes = 2 * work.num_kv_heads * work.head_dim * work.torch_dtype.itemsize
    tokens = [held_tokens(layout, rank) for rank in range(world_size)]
    return [
        [
            0 if reader == owner else row_bytes * int(visible(work, q, k).any(0).sum())
            for owner, k in enumerate(tokens)
        ]
        for reader, q in enumerate(tokens)
    ]


def visible(work: Work, q: Tensor, k: Tensor) -> Tensor:
    """bool [queries, keys]: the mask, of token positions."""
    q, k = q[:, None], k[None, :]
    seen = (k <= q) if work.causal else torch.ones(len(q), k.shape[1], dtype=torch.bool)
    if work.window is not None:
        seen = seen & (k >= q - work.window)
    ends = work.cu_seqlens()[1:].long()
    return seen & (torch.bucketize(q, ends, right=True) == torch.bucketize(k, ends, right=True))


def _against(sent: Sequence[dict[str, int]], bound: Sequence[int]) -> dict[str, Any]:
    """Sent and necessary bytes; `ratio`, of all ranks, is None where nothing has to be sent."""
    by_rank = [sum(one[f"{kind}_bytes"] for kind in KEYS_AND_GRADIENTS) for one in sent]
    return {
        "sent_bytes_by_rank": by_rank,
        "lower_bound_bytes_by_rank": list(bound),
        "ratio": sum(by_rank) / sum(bound) if sum(bound) else None,
        "relayout_bytes_by_rank": [one["relayout_bytes"] for one in sent],
        "messages_by_rank": [one["messages"] for one in sent],
    }
