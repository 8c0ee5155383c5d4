"""`RingAttentionTester`: is dilated attention over ranks what one device computes, on this machine?

    python examples/test_ring_attention.py --device cpu --ranks 2 --verbose

Every rank computes its shard through the ring, and compares with the definition, dense in float64
on the whole sequence. Prints differences, times and memory, all of them measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler_ring.core.kernels import Problem
from nnscaler_ring.dilated.ring_dilated_attention import RingDilatedAttention
from nnscaler_ring.dilated.ring_multihead_dilated_attention import RingMultiheadDilatedAttention
from nnscaler_ring.tools.demo.memory import peak_memory
from nnscaler_ring.tools.launch import Rank, check_ranks, run_ranks
from nnscaler_ring.tools.machine import usable_kernel
from nnscaler_ring.training.shards import even_shard_lens

TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 1e-1,
}
"""Largest absolute difference in a dtype, unless told otherwise; inputs are standard normal."""

LINE = "=" * 63


@dataclass(frozen=True)
class Model:
    """What a test computes; the tokens do not divide by segments nor by ranks."""

    name: str
    tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]


MODELS = (
    Model("Small Model", 101, 4, 4, 16, (16, 64), (1, 3)),
    Model("Medium Model", 391, 6, 2, 32, (64, 128, 512), (1, 2, 4)),
)
MEMORY_TOKENS = (4096, 8192)


@dataclass(frozen=True)
class TestResult:
    """One test: a difference against its tolerance, or seconds and bytes of the busiest rank."""

    __test__ = False  # not pytest's

    name: str
    passed: bool
    max_difference: float | None = None
    seconds: float | None = None
    peak_bytes: int | None = None


class RingAttentionTester:
    """A test of this machine: dilated attention over its ranks, against the definition.

    Args:
        device: "cpu" or "cuda", one GPU for each rank.
        dtype: of the tensors; float64 also takes the largest tolerance away.
        tolerance: largest absolute difference; None: `TOLERANCES` of the dtype.
        verbose: print every test, not only at the end which failed.
        ranks: that share the sequence.

    Raises:
        ValueError: this machine cannot run them; a dtype without tolerance.
    """

    def __init__(
        self,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        tolerance: float | None = None,
        verbose: bool = False,
        *,
        ranks: int = 2,
    ) -> None:
        check_ranks(ranks, device)
        if dtype not in TOLERANCES:
            raise ValueError(f"dtype must be one of {tuple(TOLERANCES)}, got {dtype}.")
        if tolerance is not None and not tolerance > 0:
            raise ValueError(f"tolerance must be above 0 or None, got {tolerance}.")
        self.device, self.dtype, self.verbose, self.ranks = device, dtype, verbose, ranks
        self.tolerance = TOLERANCES[dtype] if tolerance is None else tolerance

    def run_all_tests(self) -> dict[str, TestResult]:
        """Every test by its name.

        Raises:
            RankError: a rank raised or died.
        """
        self._say(f"{LINE}\nRing Attention Comprehensive Test Suite\n{LINE}")
        measured = run_ranks(self.ranks, _measure_on_rank, str(self.dtype), device=self.device)
        results: dict[str, TestResult] = {}
        for title, kind in (
            ("Testing equivalence with one device, same pattern...", ""),
            ("Testing multihead equivalence...", " Multihead"),
        ):
            self._say(title)
            for model in MODELS:
                name = model.name + kind
                difference = max(differences[name] for differences, _ in measured)
                passed = difference <= self.tolerance  # NaN is not
                results[name] = TestResult(name, passed, max_difference=difference)
                self._say(
                    f"  Testing {name}...\n    Max difference: {difference:.2e} "
                    f"(tolerance: {self.tolerance:.2e})\n    Equivalent: {passed}"
                )
        self._say("Testing memory complexity scaling...")
        for tokens in MEMORY_TOKENS:
            name = f"seq_len_{tokens}"
            seconds = max(costs[name][0] for _, costs in measured)
            size = max(costs[name][1] for _, costs in measured)
            results[name] = TestResult(name, True, seconds=seconds, peak_bytes=size)
            self._say(
                f"  Testing {name}...\n    Time: {seconds:.4f}s, memory per rank: "
                f"{size / 1e6:.1f}MB"
            )
        wrong = [result.name for result in results.values() if not result.passed]
        self._say(
            f"FAILED: {', '.join(wrong)}"
            if wrong
            else f"All Ring Attention tests passed over {self.ranks} ranks."
        )
        return results

    def _say(self, text: str) -> None:
        if self.verbose:
            sys.stdout.write(text + "\n")


def _measure_on_rank(
    rank: Rank, dtype_name: str
) -> tuple[dict[str, float], dict[str, tuple[float, int]]]:
    """Largest differences of each model; seconds and bytes of each length."""
    dtype = getattr(torch, dtype_name.removeprefix("torch."))
    differences = {}
    for model in MODELS:
        differences[model.name] = max(
            _difference(rank, model, dtype, causal) for causal in (True, False)
        )
        differences[f"{model.name} Multihead"] = _multihead_difference(rank, model, dtype)
    return differences, {f"seq_len_{n}": _costs(rank, n, dtype) for n in MEMORY_TOKENS}


def _kernel(model: Model, rank: Rank, dtype: torch.dtype) -> str:
    heads = model.num_heads, model.num_kv_heads, model.head_dim, model.head_dim
    return usable_kernel(Problem(rank.device.type, dtype, *heads))


def _difference(rank: Rank, model: Model, dtype: torch.dtype, causal: bool) -> float:
    """Of out, dq, dk, dv of this rank's tokens, from inputs as they are in `dtype`."""
    generator = torch.Generator().manual_seed(0)
    heads = model.num_heads, model.num_kv_heads, model.num_kv_heads, model.num_heads
    whole = [
        torch.randn(1, model.tokens, h, model.head_dim, generator=generator).to(dtype)
        for h in heads
    ]
    lens = even_shard_lens(model.tokens, rank.group)
    start = sum(lens[: rank.rank])
    rows = slice(start, start + lens[rank.rank])
    *inputs, dout = (x[:, rows].to(rank.device) for x in whole)
    inputs = [x.clone().requires_grad_() for x in inputs]
    module = RingDilatedAttention(
        model.segment_lengths,
        model.dilation_rates,
        process_group=rank.group,
        kernel=_kernel(model, rank, dtype),
    )
    out = module(*inputs, is_causal=causal, shard_lens=lens)
    found = [out.detach(), *torch.autograd.grad(out, inputs, dout)]
    *wide, wide_dout = (x.double() for x in whole)
    wide = [x.requires_grad_() for x in wide]
    dense = _definition(model, *wide, causal=causal)
    expected = [dense.detach(), *torch.autograd.grad(dense, wide, wide_dout)]
    return max(_largest(x, y[:, rows]) for x, y in zip(found, expected, strict=True))


def _multihead_difference(rank: Rank, model: Model, dtype: torch.dtype) -> float:
    """Of output and parameter gradients, summed over ranks, from the layer on one device."""
    width = model.num_heads * model.head_dim

    def layer(group: Sequence[int] | None, device: torch.device) -> Any:
        torch.manual_seed(0)
        return RingMultiheadDilatedAttention(
            width,
            model.num_heads,
            model.segment_lengths,
            model.dilation_rates,
            num_kv_heads=model.num_kv_heads,
            process_group=group,
            kernel=_kernel(model, rank, dtype) if group else "reference",
        ).to(device, dtype if group else torch.float64)

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, model.tokens, width, generator=generator).to(dtype)
    lens = even_shard_lens(model.tokens, rank.group)
    start = sum(lens[: rank.rank])
    rows = slice(start, start + lens[rank.rank])
    mine, alone = layer(rank.group, rank.device), layer(None, torch.device("cpu"))
    with torch.no_grad():
        for target, source in zip(alone.parameters(), mine.parameters(), strict=True):
            target.copy_(source)
    shard = x[:, rows].to(rank.device)
    out, _ = mine(shard, is_causal=True, shard_lens=lens)
    (out.square().sum() / model.tokens).backward()
    expected, _ = alone(x.double(), is_causal=True)
    (expected.square().sum() / model.tokens).backward()
    largest = _largest(out, expected[:, rows])
    for found, whole in zip(mine.parameters(), alone.parameters(), strict=True):
        total = found.grad.double()
        dist.all_reduce(total)
        scale = max(1.0, whole.grad.abs().max().item())
        largest = max(largest, _largest(total / scale, whole.grad / scale))
    return largest


def _costs(rank: Rank, tokens: int, dtype: torch.dtype) -> tuple[float, int]:
    """Seconds and peak bytes of a rank's forward and backward pass."""
    model = Model("", tokens, 4, 4, 64, (1024, 4096), (1, 4))
    module = RingDilatedAttention(
        model.segment_lengths,
        model.dilation_rates,
        process_group=rank.group,
        kernel=_kernel(model, rank, dtype),
    )

    def train() -> None:
        lens = even_shard_lens(tokens, rank.group)
        shape = 1, lens[rank.rank], model.num_heads, model.head_dim
        q, k, v = (
            torch.randn(shape, device=rank.device, dtype=dtype, requires_grad=True)
            for _ in range(3)
        )
        out = module(q, k, v, is_causal=True, shard_lens=lens)
        out.backward(torch.ones_like(out))

    train()  # loads what the first call loads
    start = time.perf_counter()
    with peak_memory(rank.device) as peak:
        train()
    return time.perf_counter() - start, peak.bytes


def _definition(model: Model, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """One softmax over the keys of every branch side by side, from whole score matrices."""
    shared = model.num_heads // model.num_kv_heads
    k, v = (x.repeat_interleave(shared, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * model.head_dim**-0.5
    position = torch.arange(model.tokens)
    kv_head = (torch.arange(model.num_heads) // shared).view(-1, 1, 1)
    branches = []
    for w, r in zip(model.segment_lengths, model.dilation_rates, strict=True):
        used = position % w % r == kv_head % r  # [heads, 1, tokens]
        seen = used.transpose(1, 2) & used & (position.unsqueeze(1) // w == position // w)
        if causal:
            seen = seen & (position.unsqueeze(1) >= position)
        branches.append(scores.masked_fill(~seen, -torch.inf))
    # The first branch has r = 1, so that every token sees itself.
    probabilities = torch.cat(branches, dim=-1).softmax(dim=-1)
    values = torch.cat([v] * len(branches), dim=1)
    return torch.einsum("bhij,bjhd->bihd", probabilities, values)


def _largest(found: Tensor, expected: Tensor) -> float:
    return (found.detach().cpu().double() - expected.detach()).abs().max().item()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a test failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [str(dtype).removeprefix("torch.") for dtype in TOLERANCES]
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=names, default="float32")
    parser.add_argument("--tolerance", type=float, default=None)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--verbose", action="store_true")
    given = parser.parse_args(arguments)
    try:
        tester = RingAttentionTester(
            given.device,
            getattr(torch, given.dtype),
            given.tolerance,
            given.verbose,
            ranks=given.ranks,
        )
    except ValueError as error:
        parser.error(str(error))
    results = tester.run_all_tests()
    return int(not all(result.passed for result in results.values()))
