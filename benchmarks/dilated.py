"""Dilated attention beside dense attention of the same sequence: time, and bytes as counted."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness import Contestant, OtherLoad, describe_processes, measure, rounds
from benchmarks.processes import Processes, Worker
from benchmarks.progress import Waiting
from benchmarks.rows import Row, make_row
from benchmarks.work import Attention, Run, Work, context_parallel, make_run, our_attention
from nnscaler_ring import traffic, wrap_dilated_attn_func


@dataclass(frozen=True)
class Pattern:
    """Branches of segments and rates, over a dense piece of work."""

    work: Work
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]

    @property
    def name(self) -> str:
        """All of it in one line."""
        branches = zip(self.segment_lengths, self.dilation_rates, strict=True)
        return f"{self.work.name}, dilated {' '.join(f'{w}/{r}' for w, r in branches)}"

    def parameters(self) -> dict[str, Any]:
        """For a row."""
        branches = {
            "segment_lengths": list(self.segment_lengths),
            "dilation_rates": list(self.dilation_rates),
        }
        return {**self.work.parameters(), "work": self.name, **branches}


def patterns(quick: bool) -> list[Pattern]:
    """w/r constant, up to the whole sequence: what LongNet does."""
    if quick:
        return [Pattern(Work(1024, 4, 2), (128, 512, 1024), (1, 4, 8))]
    return [
        Pattern(Work(tokens, 8, 8), (2048, 8192, tokens), (1, 4, tokens // 2048))
        for tokens in (16384, 32768)
    ]


def run(chosen: Sequence[Pattern], *, reps: int, cores: int, waiting: Waiting) -> Iterator[Row]:
    """Both on two ranks of one thread, and both in one process with all threads."""
    if not chosen:
        return
    with Processes(2) as ranks, Processes(1, threads=cores) as single:
        for pattern in chosen:
            contestants = [
                Contestant(f"{name}, {where}", processes, make, args)
                for processes, where in ((ranks, "2 ranks"), (single, "one process"))
                for name, make, args in (
                    ("dense ring", context_parallel, (pattern.work, "ring", "direct")),
                    ("dilated", dilated, (pattern,)),
                )
            ]
            with waiting.task(pattern.name, rounds(len(contestants), reps=reps)) as advance:
                load = OtherLoad((ranks, single))
                measured = measure(contestants, reps=reps, advance=advance)
                other_cores = load.cores()
            dense = {}
            for contestant in contestants:
                seconds = measured[contestant.name].samples
                size = contestant.processes.size
                is_dilated = contestant.make is dilated
                sent = contestant.processes.call(count_bytes, pattern, is_dilated)
                if not is_dilated:
                    dense[size] = seconds, sent
                yield make_row(
                    "dilated",
                    contestant.name,
                    {**pattern.parameters(), **describe_processes(contestant.processes)},
                    samples=seconds,
                    results={
                        "sent_bytes_by_rank": sent,
                        "seconds_of_dense": _median(seconds) / _median(dense[size][0]),
                        "bytes_of_dense": sum(sent) / sum(dense[size][1]) if size > 1 else None,
                        "other_cores_busy": other_cores,
                    },
                )


def dilated(worker: Worker, pattern: Pattern) -> Run:
    """The dilated op over all workers; one worker alone calls it without a group."""
    rows = pattern.work.tokens // worker.world_size
    held = slice(worker.rank * rows, (worker.rank + 1) * rows)
    tensors = [x[:, held] for x in pattern.work.tensors(pattern.work.tokens)]
    return make_run(pattern.work, _attention(worker, pattern), tensors)


def count_bytes(worker: Worker, pattern: Pattern, is_dilated: bool) -> int:
    """What this rank sends in one forward, or forward and backward, pass."""
    if worker.world_size == 1:
        return 0
    work, group = pattern.work, list(range(worker.world_size))
    dense = our_attention(worker, work, "ring", "direct")
    attention = _attention(worker, pattern) if is_dilated else dense
    before = traffic(group)
    make_run(work, attention, work.tensors(work.tokens // worker.world_size))()
    return (traffic(group) - before).total_bytes


def _attention(worker: Worker, pattern: Pattern) -> Attention:
    branches = pattern.segment_lengths, pattern.dilation_rates
    group = list(range(worker.world_size)) if worker.world_size > 1 else None

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = wrap_dilated_attn_func(
            q, k, v, *branches, causal=pattern.work.causal, process_group=group
        )
        assert isinstance(out, torch.Tensor)
        return out

    return attention


def _median(samples: Sequence[float]) -> float:
    return sorted(samples)[len(samples) // 2]
