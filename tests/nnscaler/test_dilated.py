"""The dilated op under every plan on the real nnScaler, against dense float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dilated_oracle import dilated_gradients
from tests.nnscaler.calls import BATCH, HEADS, TOKENS, process_group_in
from tests.nnscaler.models import DilatedCall
from tests.nnscaler.plans import DENSE_DIMS, PLANS, Plan, split
from tests.nnscaler.runtime import nnscaler_ranks, parallelize
from tests.oracle import make_dout, make_qkv
from tests.ranks import RankPool
from tests.tolerances import assert_close_float64

Case = tuple[Plan, tuple[int, int], dict[str, Any]]


def cases(world_size: int) -> list[Case]:
    """Every plan with options that change from one to the next."""
    found = []
    for number, plan in enumerate(plan for plan in PLANS if plan.world_size == world_size):
        options = {
            "causal": number % 3 != 0,
            "head_offsets": ("mod", "block")[number % 2],
            "return_lse": number % 2 == 0,
            "exchange": ("direct", "ring", "all_gather")[number % 3],
        }
        heads = HEADS[number % len(HEADS)]
        if heads[1] == 1 and plan.steps[0][0] == "heads" and len(plan.steps) > 1:
            heads = (4, 2)  # one KV head there is refused: see refuse_mixed_sums
        found.append((plan, heads, options))
        if plan.name == "heads":
            found += [(plan, (8, 4), {"head_offsets": x}) for x in ("mod", "block")]
            found.append((plan, (4, 1), {}))
    return found


def run_cases(ranks: list[int], chosen: list[Case]) -> list[tuple[list[Tensor], Any]]:
    """On one rank: out, gradients, and the generated process_group."""
    return [run_case(seed, *case) for seed, case in enumerate(chosen)]


def run_case(
    seed: int, plan: Plan, heads: tuple[int, int], options: dict[str, Any]
) -> tuple[list[Tensor], Any]:
    q, k, v = make_qkv(seed, BATCH, TOKENS, TOKENS, *heads, 4, 6)
    inputs = {name: x.requires_grad_() for name, x in {"q": q, "k": k, "v": v}.items()}

    def policy(graph: Any, _: Any) -> Any:
        for node in graph.select(ntype=IRFwOperation):
            split(graph, node, plan, DENSE_DIMS)
        return graph

    with nnscaler_ranks() as nnscaler:
        from nnscaler.ir.operator import IRFwOperation

        model = DilatedCall(options)
        parallel, code = parallelize(nnscaler, model, inputs, policy, plan.plan_ngpus)
        out = parallel(**inputs)
        out = out[0] if options.get("return_lse") else out
        gradients = torch.autograd.grad(out, list(inputs.values()), make_dout(seed, q, v))
    return [out.detach(), *gradients], process_group_in(code)


def check(pool: RankPool, world_size: int) -> None:
    chosen = cases(world_size)
    results = pool.run(world_size, run_cases, chosen, timeout=240)
    for number, (plan, heads, options) in enumerate(chosen):
        q, k, v = make_qkv(number, BATCH, TOKENS, TOKENS, *heads, 4, 6)
        same = {name: options[name] for name in ("head_offsets",) if name in options}
        out, _, *gradients = dilated_gradients(
            q,
            k,
            v,
            make_dout(number, q, v),
            None,
            [6, 9, 40],
            [1, 2, 3],
            causal=options.get("causal", True),
            **same,
        )
        for rank, result in enumerate(results):
            tensors, group = result[number]
            what = f"rank {rank}, {plan.name}, {heads}, {options}"
            assert group == plan.groups[rank], what
            for name, actual, dense in zip(
                ("out", "dq", "dk", "dv"), tensors, (out, *gradients), strict=True
            ):
                assert_close_float64(actual, dense, f"{name} of {what}")


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_plan(two_ranks: RankPool, four_ranks: RankPool, world_size: int) -> None:
    check(two_ranks if world_size == 2 else four_ranks, world_size)
