"""What the ranks of a call compute, one rank after another on one device: kernels, merges, sums.

Communication is left out: messages are filled aside, and what they would take is arithmetic with a
cluster's figures. So the figures say how much of one device's speed the schedules keep, and not how
fast several devices are.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nnscaler_ring.core.engine import attention_backward, attention_forward
from nnscaler_ring.core.exchange import Performance, Program
from nnscaler_ring.core.exchange.program import Post, Receive, performed
from nnscaler_ring.core.kernels import AttentionKernel, BackwardTensors, Problem, select_kernel
from nnscaler_ring.core.plan.schedule import Window
from nnscaler_ring.core.plan.tile import UNBOUNDED
from nnscaler_ring.core.ranks.groups import Place, Traffic
from nnscaler_ring.core.scores.scores import Scores
from nnscaler_ring.core.sizes import Sizes
from nnscaler_ring.core.sums.online_softmax import merge_
from nnscaler_ring.simulator.call import SimulatedCall
from nnscaler_ring.simulator.cluster import Cluster, load_cluster
from nnscaler_ring.simulator.stand_in import StandIn

MODELLED = "h200"
"""The cluster whose links stand for the communication."""

MERGES = 20
"""Timed together: one alone may take less time than its launch."""


@dataclass(frozen=True)
class Case:
    """One call: causal, in zigzag order, or packed documents in contiguous shards.

    `window`: keys before its own that a query sees. `documents`: of random lengths; 1 for none.
    """

    tokens: int
    documents: int = 1
    window: int | None = None
    backward: bool = False
    ranks: int = 8
    num_heads: int = 16
    num_kv_heads: int = 4
    head_dim: int = 128
    dtype: str = "bfloat16"

    @property
    def label(self) -> str:
        """Mask, length and passes."""
        length = f"{self.tokens // 1024}k" if self.tokens % 1024 == 0 else str(self.tokens)
        what = f" window {self.window}" if self.window is not None else ""
        what += f" {self.documents} documents" if self.documents > 1 else ""
        passes = "forward+backward" if self.backward else "forward"
        return f"causal{what} {length} {passes}"

    @property
    def shape(self) -> str:
        """Heads, head_dim and dtype."""
        return f"h{self.num_heads}:{self.num_kv_heads} d{self.head_dim} {self.dtype}"

    @property
    def name(self) -> str:
        """All of it."""
        return f"{self.label} {self.shape}"

    def call(self, ranks: int) -> SimulatedCall:
        """Over so many ranks."""
        sizes = Sizes(self.num_heads, self.num_kv_heads, self.head_dim, self.head_dim, self.dtype)
        left = UNBOUNDED if self.window is None else self.window
        cuts = random.Random(0).sample(range(1, self.tokens), self.documents - 1)
        balanced = self.window is None and self.documents == 1
        return SimulatedCall(
            self.tokens,
            ranks,
            sizes,
            Window(left, 0),
            q_layout="zigzag" if balanced else "contiguous",
            cu_seqlens=(0, *sorted(cuts), self.tokens) if cuts else None,
        )


def cases(tokens: Sequence[int], **fields: Any) -> list[Case]:
    """Causal attention of every length; of the middle one also documents and a window.

    The least work first: a run that is cut off has lost the fewest cases.
    """
    middle = sorted(tokens)[len(tokens) // 2]
    plain = [Case(count, **fields) for count in tokens]
    some = [
        *plain,
        Case(middle, documents=64, **fields),
        Case(middle, window=middle // 32, **fields),
    ]
    chosen = [replace(case, backward=backward) for case in some for backward in (False, True)]
    return sorted(chosen, key=flops)


@dataclass
class Stopwatch:
    """Seconds that a device works, less what is done aside; CUDA events on a GPU."""

    device: torch.device
    _aside: list[tuple[Any, Any]] = field(default_factory=list)

    def seconds(self, run: Callable[[], object]) -> float:
        """Of one run, to its end on the device."""
        self._aside.clear()
        start = self._mark()
        run()
        end = self._mark()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._between(start, end) - sum(self._between(*pair) for pair in self._aside)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done here does not count."""
        start = self._mark()
        with torch.no_grad():
            yield
        self._aside.append((start, self._mark()))

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between(self, start: Any, end: Any) -> float:
        if self.device.type != "cuda":
            return float(end - start)
        return float(start.elapsed_time(end)) / 1e3


@dataclass(frozen=True)
class Replay:
    """A case's tensors on a device, and the runs that are timed."""

    case: Case
    device: torch.device
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @classmethod
    def of(cls, case: Case, device: torch.device) -> Replay:
        """With standard normal tensors [1, tokens, heads, head_dim]."""
        generator = torch.Generator(device).manual_seed(0)
        dtype = case.call(1).sizes.torch_dtype
        heads = case.num_heads, case.num_kv_heads, case.num_kv_heads, case.num_heads
        shapes = ((1, case.tokens, count, case.head_dim) for count in heads)
        return cls(
            case,
            device,
            *(torch.randn(x, generator=generator, device=device, dtype=dtype) for x in shapes),
        )

    @property
    def kernel(self) -> AttentionKernel:
        """What kernel="auto" takes."""
        case = self.case
        dims = case.head_dim, case.head_dim
        return select_kernel(
            "auto",
            Problem(self.device.type, self.q.dtype, case.num_heads, case.num_kv_heads, *dims),
        )

    def of_rank(
        self, ranks: int, rank: int, aside: Callable[[], Any], sent: Traffic | None = None
    ) -> Callable[[], tuple[Tensor, Tensor | None]]:
        """A run of one of so many ranks: its out and, with a backward pass, dq.

        `sent` counts what the rank would send in one run.
        """
        call = self.case.call(ranks)
        layout = call.schedule.k_layout
        program, kernel = call.program(rank), self.kernel
        mine = call.tokens_of(layout, rank).to(self.device)
        q, k, v, dout = (x[:, mine] for x in (self.q, self.k, self.v, self.dout))
        scores = Scores(call.scale)
        tokens = {
            receive.rows: torch.cat(
                [call.tokens_of(layout, n, ((start, stop),)) for n, start, stop in receive.rows]
            ).to(self.device)
            for backward in (False, True)
            for post in _posts(program, backward=backward)
            if post.carries == "keys"
            for receive in post.receives
        }

        def fill_keys(receive: Receive, tensors: Sequence[Tensor]) -> None:
            rows = torch.cat([x[:, tokens[receive.rows]].flatten() for x in (self.k, self.v)])
            for x, some in zip(tensors, rows.split([x.numel() for x in tensors]), strict=True):
                x.view(-1).copy_(some)

        def exchange(*, backward: bool) -> Performance:
            transport = StandIn(
                Place(None, tuple(range(ranks)), rank),
                Traffic() if sent is None else sent,
                "replay",
                0,
                posts=iter(_posts(program, backward=backward)),
                keys=fill_keys,
                gradients=_fill_with_zeros,
                aside=aside,
            )
            return Performance(program, transport)

        def run() -> tuple[Tensor, Tensor | None]:
            out, lse = attention_forward(
                q, k, v, exchange=exchange(backward=False), kernel=kernel, scores=scores
            )
            if not self.case.backward:
                return out, None
            tensors = BackwardTensors(dout, None, q, k, v, out, lse)
            gradients = attention_backward(
                tensors,
                exchange=exchange(backward=True),
                kernel=kernel,
                scores=scores,
            )
            return out, gradients.dq

        return run

    def sdpa(self) -> Callable[[], object] | None:
        """A run of F.scaled_dot_product_attention; None for what it cannot compute."""
        case = self.case
        if case.documents > 1 or case.window is not None:
            return None
        q, k, v, dout = (x.transpose(1, 2) for x in (self.q, self.k, self.v, self.dout))
        q, k, v = (x.requires_grad_(case.backward) for x in (q.detach(), k.detach(), v.detach()))

        def run() -> object:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return torch.autograd.grad(out, (q, k, v), dout) if case.backward else out

        return run


def _posts(program: Program, *, backward: bool) -> list[Post]:
    actions = performed(program.actions(backward=backward), in_order=False)
    return [action for action in actions if isinstance(action, Post)]


def _fill_with_zeros(receive: Receive, tensors: Sequence[Tensor]) -> None:
    for x in tensors:
        x.zero_()


def measure(case: Case, device: torch.device, *, reps: int) -> dict[str, Any]:
    """The case on one device as a whole, and rank by rank: seconds, and what follows from them.

    `kept_fraction` is t(one device) / sum of t(rank): 1 if the schedules cost nothing.
    `peak_bytes` is torch's CUDA allocator's, None on the CPU.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    watch, replay = Stopwatch(device), Replay.of(case, device)
    one_device = _times(watch, replay.of_rank(1, 0, watch.aside), reps)
    whole = replay.of_rank(1, 0, watch.aside)()
    rank_seconds: list[list[float]] = []
    errors: list[float] = []
    traffic: list[Traffic] = []
    for rank in range(case.ranks):
        sent = Traffic()
        results = replay.of_rank(case.ranks, rank, watch.aside, sent)()
        traffic.append(sent)
        errors.append(_largest_difference(case, rank, results, whole))
        del results
        rank_seconds.append(_times(watch, replay.of_rank(case.ranks, rank, watch.aside), reps))
    medians = [statistics.median(some) for some in rank_seconds]
    one = statistics.median(one_device)
    return {
        "kernel": replay.kernel.name,
        "one_device_seconds": one_device,
        "seconds_by_rank": rank_seconds,
        **sdpa_seconds(watch, replay, reps),
        "kept_fraction": one / sum(medians),
        "busiest_rank_over_mean": max(medians) * case.ranks / sum(medians),
        "kernel_tflops_per_second": flops(case) / one / 1e12,
        "schedules_tflops_per_second": flops(case) / sum(medians) / 1e12,
        "merge": merge_bandwidth(watch, replay, reps=reps),
        "relative_l2_to_one_device": max(errors),
        "modelled_communication": modelled_communication(case, traffic, medians),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def sdpa_seconds(watch: Stopwatch, replay: Replay, reps: int) -> dict[str, Any]:
    """Of F.scaled_dot_product_attention, or why it has none: it may need whole score matrices."""
    run = replay.sdpa()
    if run is None:
        return {"sdpa_seconds": None, "sdpa_refusal": "it has no such mask without a tensor of it"}
    try:
        return {"sdpa_seconds": _times(watch, run, reps), "sdpa_refusal": None}
    except RuntimeError as error:
        return {"sdpa_seconds": None, "sdpa_refusal": str(error).partition("\n")[0]}


def merge_bandwidth(watch: Stopwatch, replay: Replay, *, reps: int) -> dict[str, float]:
    """Merging one block for a rank's query rows, against the bytes that a merge must touch.

    A merge must read the block once, and read and write the float32 sum.
    """
    case = replay.case
    rows = case.tokens // case.ranks
    block = replay.q[:, :rows].contiguous()
    out = block.to(torch.float32)
    lse = torch.zeros(1, rows, case.num_heads, device=replay.device).transpose(1, 2)
    block_lse = torch.zeros(1, case.num_heads, rows, device=replay.device)

    def run() -> None:
        for _ in range(MERGES):
            merge_(out, lse, block, block_lse)

    seconds = statistics.median(_times(watch, run, reps)) / MERGES
    least = block.nbytes + 2 * out.nbytes + block_lse.nbytes + 2 * lse.nbytes
    return {"rows": rows, "seconds": seconds, "least_bytes_per_second": least / seconds}


def modelled_communication(
    case: Case, traffic: Sequence[Traffic], compute_seconds: Sequence[float]
) -> dict[str, Any]:
    """What the counted bytes would take over a cluster's links: arithmetic, nothing was sent."""
    cluster: Cluster = load_cluster(MODELLED)
    inside = case.ranks <= cluster.devices_per_node
    link = cluster.inside if inside else cluster.between
    seconds = [
        sent.messages * link.latency_seconds + sent.total_bytes / link.bytes_per_second
        for sent in traffic
    ]
    shares = (part / whole for part, whole in zip(seconds, compute_seconds, strict=True))
    return {
        "cluster": cluster.name,
        "source": cluster.source,
        "sent_bytes_by_rank": [sent.total_bytes for sent in traffic],
        "seconds_by_rank": seconds,
        "largest_share_of_compute": max(shares),
    }


def _times(watch: Stopwatch, run: Callable[[], object], reps: int) -> list[float]:
    """Of so many runs, after one that does not count."""
    watch.seconds(run)
    return [watch.seconds(run) for _ in range(reps)]


def flops(case: Case) -> int:
    """Floating-point operations of one run on one device."""
    call = case.call(1)
    pairs = sum(tile.pairs() for tile in call.schedule.tiles(0, (0,)))
    forward = call.sizes.flops(pairs, backward=False)
    return forward + call.sizes.flops(pairs, backward=True) if case.backward else forward


def _largest_difference(
    case: Case, rank: int, mine: tuple[Tensor, Tensor | None], whole: tuple[Tensor, Tensor | None]
) -> float:
    """Relative L2 of a rank's out and dq to the rows of one device.

    Raises:
        RuntimeError: one of them is not finite.
    """
    call = case.call(case.ranks)
    tokens = call.tokens_of(call.schedule.q_layout, rank)
    errors = [0.0]
    for x, y in zip(mine, whole, strict=True):
        if x is not None and y is not None and x.numel():
            expected = y[:, tokens.to(y.device)].float()
            size = torch.linalg.vector_norm(expected)
            errors.append(float(torch.linalg.vector_norm(x.float() - expected) / size))
    # max() passes over nan.
    if not all(map(math.isfinite, errors)):
        raise RuntimeError(f"rank {rank}'s results are not finite, or one device's are not.")
    return max(errors)
