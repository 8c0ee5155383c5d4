"""Memory under way, as a GPU has it: nothing is there before `wait`, nothing may change until then.

Gloo often delivers at once, so a step that reads too early, or writes into what is still being
sent, would pass over it. Here the ranks are threads of one process, and every message arrives as
late as it may: its memory holds nan until the receiver has waited.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from nnscaler_ring.core.engine import attention_backward, attention_forward
from nnscaler_ring.core.exchange import Performance
from nnscaler_ring.core.kernels import BackwardTensors
from nnscaler_ring.core.kernels.reference import Reference
from nnscaler_ring.core.plan.layout import LAYOUTS
from nnscaler_ring.core.plan.moves import plan_moves
from nnscaler_ring.core.ranks.groups import Place
from nnscaler_ring.core.ranks.relayout import move_rows
from nnscaler_ring.core.ranks.transport import Kind, Message
from nnscaler_ring.core.scores.scores import Scores
from tests.core.kernels.test_reference import one_thread  # noqa: F401
from tests.core.plan.test_layout import random_lens, tokens_of_layout
from tests.core.plan.test_schedule import Problem, random_problems
from tests.core.test_exchange import assert_rows_equal, dense_results, engine_inputs, program_of

SECONDS = 20
"""After which a rank that waits for a message is stuck."""


@dataclass
class Wire:
    """From one rank to another: the n-th message posted there is the n-th expected here, as NCCL
    matches them. Only one thread sends and only one expects."""

    messages: dict[int, Future] = field(default_factory=dict)
    sent: int = 0
    expected: int = 0

    def send(self, kind: Kind, content: Tensor) -> None:
        self.messages.setdefault(self.sent, Future()).set_result((kind, content))
        self.sent += 1

    def expect(self) -> Future:
        self.expected += 1
        return self.messages.setdefault(self.expected - 1, Future())


@dataclass
class Late:
    """One rank's transport."""

    place: Place
    wires: dict[tuple[int, int], Wire]
    in_order: bool = True
    under_way: set["LateTransfer"] = field(default_factory=set)

    def post(
        self, kind: Kind, sends: Sequence[Message], receives: Sequence[Message]
    ) -> "LateTransfer":
        sends, receives = ([m for m in some if m.tensor.numel()] for some in (sends, receives))
        transfer = LateTransfer(self, kind, sends, receives)
        self.under_way.add(transfer)
        return transfer


class LateTransfer:
    def __init__(
        self, rank: Late, kind: Kind, sends: list[Message], receives: list[Message]
    ) -> None:
        self.rank, self.kind = rank, kind
        self.sent = [(x, x.clone()) for _, x in sends]
        for (block, _), (_, content) in zip(sends, self.sent, strict=True):
            rank.wires[rank.place.block, block].send(kind, content)
        here = rank.place.block
        self.expected = [(rank.wires[block, here].expect(), x) for block, x in receives]
        for _, x in receives:
            x.fill_(torch.nan)

    def wait(self) -> None:
        for message, x in self.expected:
            kind, content = message.result(timeout=SECONDS)
            assert (kind, content.numel()) == (self.kind, x.numel())
            assert x.isnan().all(), f"{kind}: written to before it was waited for"
            x.copy_(content.view_as(x))
        for x, content in self.sent:
            assert torch.equal(x, content), f"{self.kind}: changed while it was sent"
        self.rank.under_way.remove(self)


def run_ranks(count: int, rank_main: Callable[[Late], Any]) -> list[Any]:
    """`rank_main` of every rank, each in a thread; all it posted has been waited for."""
    wires = {pair: Wire() for pair in itertools.permutations(range(count), 2)}
    ranks = [Late(Place(None, tuple(range(count)), block), wires) for block in range(count)]
    with ThreadPoolExecutor(count) as threads:
        results = list(threads.map(rank_main, ranks))
    assert not any(rank.under_way for rank in ranks), "a transfer that nobody waited for"
    assert all(wire.sent == wire.expected for wire in wires.values())
    return results


def both_passes(problem: Problem, seed: int, name: str, keys: int) -> list[list[Tensor]]:
    """out, lse, dq, dk, dv of every rank."""
    inputs = engine_inputs(seed, problem, batch=2)

    def rank_main(transport: Any) -> list[Tensor]:
        block = transport.place.block
        q, k, v, dout = (
            x[:, (problem.q_tokens if n in (0, 3) else problem.k_tokens)[block]]
            for n, x in enumerate(inputs)
        )
        program = program_of(name, problem, block, keys)
        options: dict[str, Any] = {"kernel": Reference(), "scores": Scores(0.4)}
        out, lse = attention_forward(q, k, v, exchange=Performance(program, transport), **options)
        tensors = BackwardTensors(dout, None, q, k, v, out, lse)
        gradients = attention_backward(
            tensors,
            exchange=Performance(program, transport),
            **options,
        )
        return [out, lse, *gradients[:3]]

    return run_ranks(len(problem.ranks), rank_main)


def check(problem: Problem, seed: int, name: str, keys: int) -> None:
    expected = dense_results(problem, *engine_inputs(seed, problem, batch=2))
    for block, results in enumerate(both_passes(problem, seed, name, keys)):
        what = f"block {block}, {name}, {keys=}: {problem.what}"
        assert_rows_equal(problem, block, results, expected, what)


@pytest.mark.parametrize("name", ["direct", "ring"])
def test_messages_that_arrive_as_late_as_they_may(name):
    rng = random.Random(41)
    for seed, problem in enumerate(random_problems(41, 60, longest=13)):
        check(problem, seed, name, keys=rng.choice((2, 3, 5)))


def test_rows_that_arrive_as_late_as_they_may():
    rng = random.Random(42)
    for source, target in (("contiguous", "zigzag"), ("zigzag", "contiguous")):
        for _ in range(20):
            lens = random_lens(rng, longest=9)
            layouts = LAYOUTS[source].for_shards(lens), LAYOUTS[target].for_shards(lens)
            rows = torch.randn(sum(lens), 2)

            def rank_main(
                transport: Any, source=source, lens=lens, layouts=layouts, rows=rows
            ) -> Tensor:
                block = transport.place.block
                mine = rows[tokens_of_layout(source, lens)[block]]
                (moved,) = move_rows([(mine, 0)], plan_moves(*layouts, block), transport)
                return moved

            for block, moved in enumerate(run_ranks(len(lens), rank_main)):
                assert torch.equal(moved, rows[tokens_of_layout(target, lens)[block]])
