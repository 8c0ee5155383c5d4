"""What a run would take: memory, bytes and time of every strategy, and how few ranks would do.

Note [A plan's shortcuts]
    Memory depends on a rank's share and on a few steps: it is foretold for a small group of ranks
    with shares of the same length, unless an exchange holds all keys. Time is that of the first,
    the middle and the last rank, each beside peers that are like it, the slowest counting; causal
    contiguous work, where they differ most, is bound by the last rank, whose senders are done
    before it needs them. Their programs come from a schedule in which pairs of ranks that are alike
    stand for each other (alike_schedule.py), and have one message for each pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from nnscaler_ring.core.exchange import EXCHANGES, Cut, Program
from nnscaler_ring.core.plan.schedule import Mask
from nnscaler_ring.core.sizes import SentBytes, Sizes
from nnscaler_ring.simulator.alike_schedule import AlikeSchedule
from nnscaler_ring.simulator.call import SimulatedCall, sides_of
from nnscaler_ring.simulator.cluster import Cluster
from nnscaler_ring.simulator.costs import Costs
from nnscaler_ring.simulator.memory import KernelTraits, Memory, predict_memory, traits_of
from nnscaler_ring.simulator.timeline import Timeline, run_programs

MOST_RANKS = 16384
"""That a plan is made for: its time grows with the ranks, a second for some thousand."""

ALIKE_RANKS = 4
"""See Note [A plan's shortcuts]."""

ALIKE_SECONDS = 1.05
"""Times that differ by less are alike to a model; of those the one that needs least memory wins."""

ONE_MESSAGE = Cut(forward_keys=1 << 60, backward_keys=1 << 60)
"""All that a rank reads from another at once: as many bytes and seconds, fewer actions."""


@dataclass(frozen=True)
class Job:
    """What is to be planned: one model's attention over a long sequence.

    Args:
        backward: a training step; else a forward pass that keeps nothing for later.
        recompute: a layer's q, k, v and result are computed again in its backward pass, so that
            only its input, of the size of q, is kept.
        reserve_bytes: of each device, for everything that is not attention.
    """

    tokens: int
    ranks: int
    layers: int
    sizes: Sizes
    mask: Mask
    backward: bool = True
    recompute: bool = False
    reserve_bytes: float = 0.0

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ValueError(f"layers must be at least 1, got {self.layers}.")
        if self.reserve_bytes < 0:
            raise ValueError(f"reserve must be at least 0 bytes, got {self.reserve_bytes}.")
        if not 1 <= self.ranks <= MOST_RANKS:
            raise ValueError(f"ranks must be 1 to {MOST_RANKS}, got {self.ranks}.")
        if self.tokens < self.ranks:
            raise ValueError(
                f"tokens must be at least ranks={self.ranks}, one for each, got {self.tokens}; "
                "use fewer ranks."
            )

    def call(
        self, layout: str, exchange: str = "direct", *, tokens: int, ranks: int
    ) -> SimulatedCall:
        """One layer's attention."""
        return SimulatedCall(tokens, ranks, self.sizes, self.mask, layout, exchange=exchange)


@dataclass(frozen=True)
class StrategyPlan:
    """What one strategy takes on the rank for which it is most.

    Bytes are sent by one rank in one layer; seconds are of all layers. `smallest_ranks` is None
    where no number of ranks gives enough memory; `reason` says why the strategy does not fit.
    """

    layout: str
    exchange: str
    memory: dict[str, int]
    total_memory: int
    fits: bool
    reason: str
    smallest_ranks: int | None
    sent: SentBytes
    forward_seconds: float
    backward_seconds: float
    overlap: float
    busiest_over_mean: float

    @property
    def seconds(self) -> float:
        """Of all layers and passes."""
        return self.forward_seconds + self.backward_seconds


@dataclass(frozen=True)
class Plan:
    """Every strategy's plan; `recommended` is None where none fits, `advice` says what to do."""

    job: Job
    cluster: Cluster
    strategies: tuple[StrategyPlan, ...]
    recommended: StrategyPlan | None
    advice: str

    def to_json(self) -> dict[str, Any]:
        """Plain values; bytes, seconds and tokens; a side of the mask without a bound is null."""
        return {
            "job": asdict(self.job) | {"mask": sides_of(self.job.mask)},
            "cluster": self.cluster.to_json(),
            "strategies": [_strategy_json(s) for s in self.strategies],
            "recommended": self.recommended and _strategy_json(self.recommended),
            "advice": self.advice,
        }


def plan(job: Job, cluster: Cluster) -> Plan:
    """Plan every strategy and recommend the fastest that fits.

    Raises:
        ValueError: the cluster has no rates for the dtype, or too little memory for a token.
    """
    planner = _Planner(job, cluster)
    planner.check_one_token()
    strategies = tuple(planner.strategies())
    fitting = [s for s in strategies if s.fits]
    fastest = min((s.seconds for s in fitting), default=0.0)
    alike = [s for s in fitting if s.seconds <= ALIKE_SECONDS * fastest]
    best = min(alike, key=lambda s: s.total_memory, default=None)
    return Plan(job, cluster, strategies, best, _advice(job, strategies, best))


@dataclass(frozen=True)
class _Planner:
    job: Job
    cluster: Cluster

    @property
    def available(self) -> float:
        """Bytes of a device that attention may have."""
        return self.cluster.memory_bytes - self.job.reserve_bytes

    @property
    def traits(self) -> KernelTraits:
        if self.cluster.device_type != "cpu":
            return KernelTraits()
        from nnscaler_ring.core.kernels.torch_cpu import TorchCpu

        return traits_of(TorchCpu())

    def check_one_token(self) -> None:
        need = min(
            sum(self._memory("zigzag", exchange, ranks=self.job.tokens, share=1).values())
            for exchange, some in EXCHANGES.items()
            if not some.holds_all_keys
        )
        if need > self.available:
            raise ValueError(
                f"memory must hold at least one token of every layer, {need} bytes, "
                f"got {self.available:.0f} (memory less reserve); give more memory, or plan fewer "
                "layers or heads."
            )

    def strategies(self) -> Iterator[StrategyPlan]:
        job = self.job
        for layout in ("zigzag", "contiguous"):
            whole = job.call(layout, tokens=job.tokens, ranks=job.ranks).schedule
            schedules = [AlikeSchedule(whole, rank) for rank in self._samples(job.ranks)]
            busiest = max(schedule.visible_pairs() for schedule in schedules)
            mean = self._mean_pairs()
            for exchange, some in EXCHANGES.items():
                programs = [
                    some.program(schedule, schedule.rank, ONE_MESSAGE) for schedule in schedules
                ]
                memory = self._memory(layout, exchange, ranks=job.ranks)
                total = sum(memory.values())
                fits = total <= self.available
                smallest = self._smallest(layout, exchange)
                forward, backward = (self._time(programs, back) for back in (False, True))
                passes = [forward, backward] if job.backward else [forward]
                yield StrategyPlan(
                    layout=layout,
                    exchange=exchange,
                    memory=memory,
                    total_memory=total,
                    fits=fits,
                    reason="" if fits else _reason(total, self.available, smallest),
                    smallest_ranks=smallest,
                    sent=self._sent(programs),
                    forward_seconds=forward.seconds * job.layers,
                    backward_seconds=backward.seconds * job.layers if job.backward else 0.0,
                    overlap=sum(t.overlap for t in passes) / len(passes),
                    busiest_over_mean=busiest / mean if mean else 1.0,
                )

    def _samples(self, ranks: int) -> list[int]:
        return sorted({0, ranks // 2, ranks - 1})

    def _mean_pairs(self) -> float:
        """Of all ranks: the pairs of the whole matrix, one tile."""
        call = self.job.call("contiguous", tokens=self.job.tokens, ranks=1)
        return sum(tile.pairs() for tile in call.schedule.tiles(0, (0,))) / self.job.ranks

    def _time(self, programs: list[Program], backward: bool) -> Timeline:
        """Of the slowest rank: Note [A plan's shortcuts]."""
        costs = Costs(self.job.sizes, self.cluster, self.traits)
        each = [
            run_programs({some.rank: some}, costs, backward=backward, keeps_events=False)
            for some in programs
        ]
        return max(each, key=lambda timeline: timeline.seconds)

    def _sent(self, programs: list[Program]) -> SentBytes:
        each = [self.job.sizes.sent_bytes(program.sent()) for program in programs]
        most = max(each, key=lambda sent: sent.total_bytes)
        return most if self.job.backward else replace(most, backward_kv_bytes=0, gradient_bytes=0)

    def _memory(
        self, layout: str, exchange: str, *, ranks: int, share: int | None = None
    ) -> dict[str, int]:
        """Bytes by component on the rank that needs most, all layers."""
        job, sizes = self.job, self.job.sizes
        share = -(-job.tokens // ranks) if share is None else share
        few = ranks if EXCHANGES[exchange].holds_all_keys else min(ranks, ALIKE_RANKS)
        call = job.call(layout, exchange, tokens=share * few, ranks=few)
        worst = Memory({})
        for rank in self._samples(few):
            one = predict_memory(call, rank, self.traits, backward=job.backward)
            worst = max(worst, one, key=lambda memory: memory.total)
        components = dict(worst.components)
        if job.backward:
            kept = sizes.q_numbers * sizes.itemsize
            if not job.recompute:
                numbers = sizes.q_numbers + sizes.kv_numbers + sizes.out_numbers
                kept = numbers * sizes.itemsize + sizes.lse_bytes
            components["saved by other layers"] = (job.layers - 1) * share * kept
        return components

    def _smallest(self, layout: str, exchange: str) -> int | None:
        """The fewest ranks that fit, by bisection; memory falls as ranks are added."""
        job = self.job
        most = min(job.tokens, MOST_RANKS)
        if EXCHANGES[exchange].holds_all_keys:
            # Every rank holds all keys; more ranks than this would not help any more.
            if job.tokens * job.sizes.kv_numbers * job.sizes.itemsize > self.available:
                return None
            most = min(most, 1024)

        def fits(ranks: int) -> bool:
            return sum(self._memory(layout, exchange, ranks=ranks).values()) <= self.available

        if not fits(most):
            return None
        low, high = 0, most  # low does not fit, high does
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        return high


def _reason(total: int, available: float, smallest: int | None) -> str:
    need = f"needs {gigabytes(total)} per rank, has {gigabytes(available)}"
    if smallest is None:
        return f"{need}; no number of ranks up to {MOST_RANKS} is enough"
    return f"{need}; {counted(smallest, 'rank')} would do"


def _advice(job: Job, strategies: tuple[StrategyPlan, ...], best: StrategyPlan | None) -> str:
    if best:
        assert best.smallest_ranks is not None, best
        fewest = f"{counted(best.smallest_ranks, 'rank')} would be enough memory"
        ranks = counted(job.ranks, "rank")
        return f"{best.layout} layout, exchange={best.exchange!r}, {ranks}; {fewest}."
    enough = [s.smallest_ranks for s in strategies if s.smallest_ranks is not None]
    remedies = [f"use at least {counted(min(enough), 'rank')}"] if enough else []
    if job.backward and not job.recompute:
        remedies.append("recompute layers (--recompute)")
    if job.reserve_bytes:
        remedies.append("reserve less")
    remedies.append("shard the heads or layers over other devices")
    return f"Nothing fits: {', or '.join(remedies)}."


def counted(number: int, what: str) -> str:
    """1 rank, 2 ranks, 1,000,000 tokens."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def gigabytes(size: float) -> str:
    """For people: powers of 1000."""
    for unit, factor in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= 0.9995 * factor:
            return (
                f"{size / factor:.3g} {unit}"
                if size < 999.5 * factor
                else f"{size / factor:.0f} {unit}"
            )
    return f"{size:.0f} B"


def _strategy_json(strategy: StrategyPlan) -> dict[str, Any]:
    return asdict(strategy) | {"seconds": strategy.seconds}
