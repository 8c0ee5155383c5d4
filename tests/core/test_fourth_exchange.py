"""An exchange that nobody has seen, registered here, goes everywhere without another file touched.

It takes rows of several ranks into one place, in an order of its own, and sends the gradients of
one place to several owners: what a gathered exchange needs. The engine performs it with messages
that arrive as late as they may; the simulator, the planner and dilated attention read it.
"""

import ast
import json
import random
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import nnscaler_ring
from nnscaler_ring.core.dilated import DilatedPlan, dilated_backward, dilated_forward
from nnscaler_ring.core.exchange import EXCHANGES
from nnscaler_ring.core.exchange.program import Compute
from nnscaler_ring.core.kernels.reference import Reference
from nnscaler_ring.core.plan.dilation import Branch, HeadOffsets
from nnscaler_ring.core.plan.schedule import CAUSAL, FULL
from nnscaler_ring.core.sizes import Sizes
from nnscaler_ring.dilated.memory import DilatedShape, predict_needs
from nnscaler_ring.simulator import (
    GeneratedInputs,
    RingAttentionMemoryProfiler,
    RingAttentionSimulator,
    SimulatedCall,
)
from nnscaler_ring.simulator.cluster import load_cluster
from nnscaler_ring.simulator.memory import KernelTraits
from nnscaler_ring.simulator.timeline import simulate_timeline
from nnscaler_ring.tools.commands import commands
from tests.core.kernels.test_reference import one_thread  # noqa: F401
from tests.core.plan.test_schedule import random_problems
from tests.core.test_message_lifetimes import check, run_ranks
from tests.core.toy_exchange import TOY
from tests.dilated_oracle import dilated_gradients
from tests.oracle import make_dout, make_qkv
from tests.tolerances import assert_close_float64


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXCHANGES, "toy", TOY)


def test_engine() -> None:
    for seed, problem in enumerate(random_problems(61, 40, longest=13)):
        check(problem, seed, "toy", keys=3)


def test_simulator_stands_in_for_the_peers() -> None:
    sizes = Sizes(4, 2, 8, 6, "float64")
    results = {}
    for exchange in ("toy", "direct"):
        call = SimulatedCall(61, 4, sizes, CAUSAL, "zigzag", exchange=exchange)
        simulator = RingAttentionSimulator(call, GeneratedInputs(sizes))
        results[exchange] = simulator.all_ranks(backward=True)
        for rank, sent in enumerate(results[exchange].sent):
            predicted = sizes.sent_bytes(call.program(rank).sent())
            assert sent.forward_kv_bytes == predicted.forward_kv_bytes
            assert sent.gradient_bytes == predicted.gradient_bytes
    for ours, other in zip(results["toy"][:5], results["direct"][:5], strict=True):
        assert_close_float64(ours, other, "toy beside direct")


@pytest.mark.parametrize("backward", [False, True])
def test_memory_is_foretold(backward: bool) -> None:
    sizes = Sizes(4, 2, 16, 16, "bfloat16")
    call = SimulatedCall(3 * 2048, 3, sizes, CAUSAL, "zigzag", exchange="toy")
    simulator = RingAttentionSimulator(call, GeneratedInputs(sizes))
    found = RingAttentionMemoryProfiler(simulator, 2, backward=backward).profile()
    assert abs(found.predicted - found.total) <= 0.05 * found.total, found  # type: ignore[operator]


def test_timeline_computes_the_mask_and_moves_the_bytes() -> None:
    cluster = load_cluster("h200")
    sizes = Sizes(32, 8, 128, 128, "bfloat16")
    seconds = {}
    for exchange in ("toy", "direct"):
        call = SimulatedCall(65_536, 4, sizes, CAUSAL, "zigzag", exchange=exchange)
        lines = simulate_timeline(call, cluster, KernelTraits(), backward=True).ranks
        seconds[exchange] = sum(rank.seconds("compute") for rank in lines)
        assert all(rank.seconds("transfer") > 0 for rank in lines)
    # The same pairs, in fewer kernel calls and merges.
    assert 0.9 * seconds["direct"] < seconds["toy"] < seconds["direct"]


def test_planner_and_command_line() -> None:
    arguments = ["plan", "--tokens", "65536", "--ranks", "8", "--json"]
    result = CliRunner().invoke(commands, arguments)
    assert result.exit_code == 0, result.output
    toys = [s for s in json.loads(result.stdout)["strategies"] if s["exchange"] == "toy"]
    assert len(toys) == 2 and all(s["total_memory"] > 0 for s in toys)


@pytest.mark.parametrize("causal", [True, False])
def test_dilated_attention(causal: bool) -> None:
    """Branches that reach beyond shards, so that rows travel, some of them as whole runs."""
    rng = random.Random(7)
    for seed in range(6):
        lens = tuple(rng.choice((1, rng.randint(2, 12))) for _ in range(4))
        branches = [Branch(7, 1), Branch(sum(lens), 2), Branch(13, 3)]
        q, k, v = make_qkv(seed, 1, sum(lens), sum(lens), 4, 2, 5, 3)
        tensors = q, k, v, make_dout(seed, q, v)

        def rank_main(transport, lens=lens, branches=branches, tensors=tensors):  # type: ignore[no-untyped-def]
            block = transport.place.block
            q, k, v, dout = (x.split(lens, dim=1)[block] for x in tensors)
            offsets = HeadOffsets("mod", 0, 4)
            mask = CAUSAL if causal else FULL
            plan = DilatedPlan.of(branches, offsets, 2, lens, mask, "toy", block)
            options = {"plan": plan, "transport": transport, "kernel": Reference()}
            out, lse = dilated_forward(q, k, v, softmax_scale=0.4, **options)
            grads = dilated_backward(dout, None, q, k, v, out, lse, softmax_scale=0.4, **options)
            return [out, lse, *grads]

        pattern = [b.length for b in branches], [b.rate for b in branches]
        dense = dilated_gradients(*tensors, None, *pattern, causal=causal, softmax_scale=0.4)
        results = run_ranks(len(lens), rank_main)
        for n, expected in enumerate(dense):
            dim = 2 if n == 1 else 1
            ours = torch.cat([shard[n] for shard in results], dim=dim)
            assert_close_float64(ours, expected, f"{n} of {lens}, {causal=}")


def test_memory_of_a_dilated_call() -> None:
    sizes = Sizes(4, 2, 16, 16, "float32")
    shape = DilatedShape(
        (64, 512), (1, 2), True, HeadOffsets("mod", 0, 4), "toy", (128,) * 4, sizes
    )
    needs = predict_needs(shape, 3)
    assert needs.training.total > needs.forward.total > needs.messages > 0


def test_nobody_outside_asks_which_exchange_it_is() -> None:
    """No name of an exchange, and no function of one, is compared or imported outside its room."""
    package = Path(nnscaler_ring.__file__).parent
    names = set(EXCHANGES)
    for path in package.rglob("*.py"):
        if "core/exchange" in path.as_posix() or path.name == "transformer_engine.py":
            continue  # the latter is another package's attention, with exchanges of its own
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(package)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Compare) and "exchange" in ast.unparse(node):
                constants = [
                    c.value for c in (node.left, *node.comparators) if isinstance(c, ast.Constant)
                ]
                assert not names & {c for c in constants if isinstance(c, str)}, where
            if isinstance(node, ast.MatchValue) and isinstance(node.value, ast.Constant):
                assert node.value.value not in names, where
            if isinstance(node, ast.ImportFrom) and "core.exchange" in (node.module or ""):
                assert not (node.module or "").endswith(tuple(names)), where
                assert not names & {alias.name for alias in node.names}, where


def test_toy_computes_in_few_calls() -> None:
    """It is another exchange indeed: a rank's keys come in two stages, not one source a step."""
    call = SimulatedCall(600, 6, Sizes(2, 2, 8, 8), FULL, exchange="toy")
    steps = [action for action in call.program(1).forward if isinstance(action, Compute)]
    assert [len({source for source, _, _ in step.rows}) for step in steps] == [1, 3, 2]
