"""What nnScaler's own ring attention gets wrong, one test for each that could come back here.

Their other defects are covered by the product in test_plans.py: windows without causal, packed
queries and keys of different documents, sequence x replica, heads x sequence, batch x sequence,
strided groups, zigzag without causal, v_head_dim, MQA.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.nnscaler.calls import OPS
from tests.nnscaler.models import OneCall, TwoCalls
from tests.nnscaler.plans import DENSE_DIMS, PACKED_DIMS, PLANS, split
from tests.nnscaler.runtime import nnscaler_ranks, parallelize
from tests.oracle import dense_gradients, make_dout, make_qkv
from tests.ranks import RankPool
from tests.tolerances import assert_close_float64, assert_close_relative


def run(
    ranks: list[int], op: str, tensors: tuple[Tensor, ...], dout: Tensor, plan_name: str
) -> tuple[list[Tensor], str]:
    """out, dq, dk, dv of a causal call under a plan, and the generated code."""
    plan = next(plan for plan in PLANS if plan.name == plan_name)
    q, k, v = (x.clone().requires_grad_() for x in tensors)
    inputs = {"q": q, "k": k, "v": v}
    if op == "two calls":
        model: Any = TwoCalls()
    else:
        model = OneCall(op, {"causal": True})
        if op == "varlen":
            bounds = torch.tensor([0, len(q)], dtype=torch.int32)
            inputs |= {"cu_q": bounds, "cu_k": bounds}
    dims = PACKED_DIMS if op == "varlen" else DENSE_DIMS

    def policy(graph: Any, _: Any) -> Any:
        for node in graph.select(ntype=IRFwOperation):
            if "wrap_" in node.signature:
                split(graph, node, plan, dims)
            elif node.name != "multiref":
                for device, part in enumerate(graph.replicate(node, plan.plan_ngpus)):
                    graph.assign(part, device)
        return graph

    with nnscaler_ranks() as nnscaler:
        from nnscaler.ir.operator import IRFwOperation

        parallel, code = parallelize(nnscaler, model, inputs, policy, plan.plan_ngpus)
        out = parallel(**inputs)
        gradients = torch.autograd.grad(out, (q, k, v), dout)
    return [out.detach(), *gradients], code


def dense(op: str, tensors: tuple[Tensor, ...], dout: Tensor) -> list[Tensor]:
    bounds = [0, tensors[0].shape[0]] if op == "varlen" else None
    out, _, *gradients = dense_gradients(*tensors, dout, causal=True, cu_seqlens_q=bounds)
    return [out, *gradients]


def inputs(op: str, tokens: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Any:
    tensors = make_qkv(7, None if op == "varlen" else 2, tokens, tokens, 4, 2, 4, None, dtype)
    q, k, v = tensors
    return (q * scale, k * scale, v), make_dout(7, q, v)


def test_odd_blocks(two_ranks: RankPool) -> None:
    """An odd number of tokens on each rank made one rank raise and the others hang."""
    for op in OPS:
        tensors, dout = inputs(op, 2 * 7)
        for found, _ in two_ranks.run(2, run, op, tensors, dout, "sequence", timeout=30):
            for x, y in zip(found, dense(op, tensors, dout), strict=True):
                assert_close_float64(x, y, op)


def test_large_scores(four_ranks: RankPool) -> None:
    """Scores of several hundred overflowed the merge of partial results: NaN in dk."""
    for op in OPS:
        tensors, dout = inputs(op, 32, 30.0, torch.bfloat16)
        results = four_ranks.run(4, run, op, tensors, dout, "sequence over 4", timeout=30)
        for found, _ in results:
            for x, y in zip(found[:1], dense(op, tensors, dout)[:1], strict=True):
                assert_close_relative(x, y, op)
            assert all(x.isfinite().all() for x in found)


def test_float32_backward(four_ranks: RankPool) -> None:
    """The gradient of q was added into the buffer of the exchange: wrong in float32 only."""
    for op in OPS:
        tensors, dout = inputs(op, 32, dtype=torch.float32)
        results = four_ranks.run(4, run, op, tensors, dout, "sequence over 4", timeout=30)
        for found, _ in results:
            for x, y in zip(found, dense(op, tensors, dout), strict=True):
                assert_close_relative(x, y, op)


def test_two_calls_on_one_q(four_ranks: RankPool) -> None:
    """Each call gets the ranks of its own sub-calls."""
    tensors, dout = inputs("ring", 16)
    q, k, v = tensors
    results = four_ranks.run(4, run, "two calls", tensors, dout, "sequence x heads, strided")
    first = dense_gradients(q, k, v, dout, causal=True)
    second = dense_gradients(q, v, k, dout)
    expected = [first[0] + second[0], first[2] + second[2]]
    expected += [first[3] + second[4], first[4] + second[3]]
    for rank, (found, code) in enumerate(results):
        assert code.count(f"process_group={((0, 2), (1, 3))[rank % 2]}") == 2
        for x, y in zip(found, expected, strict=True):
            assert_close_float64(x, y, "two calls")


def make_groups_apart(ranks: list[int]) -> str:
    """Ranks 0, 1 and 2, 3 make their groups at the same time, and nobody waits for the others."""
    from nnscaler_ring import traffic

    mine = (0, 1) if dist.get_rank() < 2 else (2, 3)
    traffic(mine)
    return "made"


def test_groups_are_made_by_their_members(four_ranks: RankPool) -> None:
    """torch.distributed.new_group is for all ranks at once; different lists collided."""
    assert four_ranks.run(4, make_groups_apart, timeout=20) == ["made"] * 4


def traced_names(ranks: list[int]) -> list[str]:
    with nnscaler_ranks():
        from nnscaler.graph.parser.register import CustomizedOps

        fakes = getattr(CustomizedOps, "kOpFakeRuntime", {})  # since 0.9
        return [fn.__name__ for name, fn in fakes.items() if name.startswith("nnscaler_ring")]


def test_slow_traces_can_be_logged(two_ranks: RankPool) -> None:
    """nnScaler logs the name of a function that takes long to trace."""
    names = two_ranks.run(2, traced_names)[0]
    assert not names or {"wrap_ring_attn_func", "wrap_zigzag_attn_func"} < set(names)
