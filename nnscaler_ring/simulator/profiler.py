"""What one rank of a simulated call holds in memory, component by component, and what was foretold.

Note [Components]
    q; kv, the rank's own shard; kv_chunk, the keys of the message that is computed; messages, what
    is under way or packed to go, gradients too; temp_scores, what a kernel needs beside its results
    (for kernel="reference" whole score matrices); block, one kernel call's results; sums, partial
    results and sums of gradients, float32 for half precision; results: out, softmax_lse and dout.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nnscaler_ring.core.exchange import GradientStep, Keys, KVExchange
from nnscaler_ring.core.kernels import AttentionKernel, BackwardTensors, TileGradients
from nnscaler_ring.core.plan.tile import KernelCall, Tile
from nnscaler_ring.core.scores.scores import TileScores
from nnscaler_ring.simulator.live_bytes import LiveBytes
from nnscaler_ring.simulator.memory import predict_memory, traits_of
from nnscaler_ring.simulator.simulator import RingAttentionSimulator


@dataclass(frozen=True)
class MemoryProfile:
    """Bytes of one rank, measured and predicted.

    `at_peak` adds up to `total`; `highest` has each component's own maximum. `allocator_peak` is
    torch's CUDA allocator's, with what the stand-ins for other ranks needed; None on the CPU.
    `predicted` is None for calls with `ScoreOptions`, whose blocks of scores are not foretold.
    """

    rank: int
    backward: bool
    at_peak: dict[str, int]
    highest: dict[str, int]
    predicted: int | None
    allocator_peak: int | None

    @property
    def total(self) -> int:
        """The peak of live tensor bytes."""
        return sum(self.at_peak.values())


class RingAttentionMemoryProfiler:
    """Measures every component of a rank's memory while the real engine runs its share.

    Counted are the bytes of live tensors (Note [Live bytes]); messages that stand-ins for other
    ranks make do count, the work behind them does not.

    Args:
        simulator: the call, its inputs and its device.
        rank: whose share is run.
        backward: with the backward pass.
    """

    def __init__(
        self, simulator: RingAttentionSimulator, rank: int = 0, *, backward: bool = True
    ) -> None:
        self.simulator = simulator
        self.rank = rank
        self.backward = backward

    def profile(self) -> MemoryProfile:
        """Run the share once and count."""
        device = torch.device(self.simulator.device)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        watch = _Watch()
        self.simulator.rank_share(self.rank, backward=self.backward, observer=watch)
        allocator = None
        if device.type == "cuda":
            allocator = torch.cuda.max_memory_allocated(device) - before
        meter = watch.meter
        return MemoryProfile(
            rank=self.rank,
            backward=self.backward,
            at_peak={name: n for name, n in sorted(meter.peak.items()) if n},
            highest={name: n for name, n in sorted(meter.highest.items()) if n},
            predicted=self._predicted(),
            allocator_peak=allocator,
        )

    def profile_memory_usage(self) -> dict[str, int]:
        """Bytes: four usual figures, every other component, and the prediction.

        `<component>_memory` is the component's own maximum, `total_memory` the peak of all
        together, which is less than the sum of maxima.
        """
        profile = self.profile()
        figures = {name: 0 for name in ("q_memory", "kv_chunk_memory", "temp_scores_memory")}
        figures.update({f"{name}_memory": n for name, n in profile.highest.items()})
        figures["total_memory"] = profile.total
        if profile.predicted is not None:
            figures["predicted_total_memory"] = profile.predicted
        return figures

    def _predicted(self) -> int | None:
        simulator = self.simulator
        if not simulator.options.is_plain:
            return None
        traits = traits_of(simulator.kernel)
        return predict_memory(simulator.call, self.rank, traits, backward=self.backward).total


@dataclass
class _Watch:
    """An Observer that names what is made, by where it is made."""

    meter: LiveBytes = field(default_factory=LiveBytes)

    def own(self, **tensors: Tensor) -> None:
        components = {"q": "q", "k": "kv", "v": "kv", "bias": "bias"}
        for name, x in tensors.items():
            component = components.get(name, "results")
            self.meter.see(x, component)
            self.meter.move(x, component)

    def kernel(self, kernel: AttentionKernel) -> AttentionKernel:
        return _WatchedKernel(kernel, self.meter)

    def exchange(self, exchange: KVExchange) -> KVExchange:
        return _WatchedExchange(exchange, self.meter)

    def aside(self) -> AbstractContextManager[None]:
        return self.meter.paused()

    @contextmanager
    def running(self) -> Iterator[None]:
        with self.meter, self.meter.making("sums"):
            yield


class _WatchedKernel:
    """Passes calls on; results are `block`, everything else that the kernel makes temp_scores."""

    def __init__(self, inner: AttentionKernel, meter: LiveBytes) -> None:
        self.inner = inner
        self.meter = meter
        self.name = inner.name

    def calls(self, tiles: Sequence[Tile], *, plain: bool) -> Sequence[KernelCall]:
        return self.inner.calls(tiles, plain=plain)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scores: TileScores) -> tuple[Tensor, Tensor]:
        return self._watched(self.inner.forward, q, k, v, scores)

    def backward(self, tensors: BackwardTensors, scores: TileScores) -> TileGradients:
        return self._watched(self.inner.backward, tensors, scores)

    def _watched(self, compute: Any, *arguments: Any) -> Any:
        with self.meter.making("temp_scores"):
            results = compute(*arguments)
        for x in results:
            if x is not None:
                self.meter.move(x, "block")
        return results


@dataclass(frozen=True)
class _WatchedExchange:
    """Passes steps on; what the exchange makes between them are messages."""

    inner: KVExchange
    meter: LiveBytes

    def steps(self, k: Tensor, v: Tensor) -> Iterator[Keys]:
        return self._watched(self.inner.steps(k, v))

    def gradient_steps(self, k: Tensor, v: Tensor) -> Iterator[GradientStep]:
        return self._watched(self.inner.gradient_steps(k, v))

    def gradients(self) -> tuple[Tensor, Tensor]:
        return self.inner.gradients()

    def _watched(self, steps: Iterator[Any]) -> Iterator[Any]:
        while True:
            # The exchange makes two kinds of tensors: messages, and sums, which start as zeros or
            # as a copy in float32.
            with self.meter.making("messages", zeros="sums", _to_copy="sums"):
                step = next(steps, None)
            if step is None:
                return
            for keys in step[:2]:
                self.meter.move(keys, "kv_chunk", keep="kv")
                del keys
            yield step
            del step
