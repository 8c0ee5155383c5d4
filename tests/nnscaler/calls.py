"""One attention call under every plan: the product, a rank's part, and the comparison."""

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.nnscaler.models import OneCall
from tests.nnscaler.plans import DENSE_DIMS, PACKED_DIMS, PLANS, Plan, split
from tests.nnscaler.runtime import nnscaler_ranks, parallelize
from tests.oracle import dense_gradients, make_dout, make_qkv, random_cu_seqlens
from tests.ranks import RankPool
from tests.tolerances import assert_close_float64

OPS = ("ring", "zigzag", "varlen")
MASKS: tuple[dict[str, Any], ...] = (
    {"causal": True},
    {"causal": False},
    {"causal": True, "window_size": (9, -1)},
    {"causal": False, "window_size": (3, 6)},
)
HEADS = ((4, 4), (4, 2), (4, 1), (8, 4))
EXCHANGES = ("direct", "ring", "all_gather")
TOKENS = 24  # 4 blocks of 6: zigzag chunks of 3, and windows that end inside a block


@dataclass(frozen=True)
class Case:
    """One call of an op under one plan."""

    op: str
    plan: Plan
    mask: int
    heads: tuple[int, int]
    exchange: str
    return_lse: bool
    seed: int

    def __str__(self) -> str:
        return f"{self.op}, {self.plan.name}, {MASKS[self.mask]}, heads {self.heads}"

    def options(self) -> dict[str, Any]:
        """What the model passes beside tensors."""
        return {**MASKS[self.mask], "exchange": self.exchange, "return_lse": self.return_lse}

    def inputs(self) -> dict[str, Tensor]:
        """q, k, v, and cu_q, cu_k of packed ones; v has its own head dim."""
        batch = None if self.op == "varlen" else 4
        q, k, v = make_qkv(self.seed, batch, TOKENS, TOKENS, *self.heads, 4, 6)
        if self.op != "varlen":
            return {"q": q, "k": k, "v": v}
        rng = random.Random(self.seed)
        cu_q, cu_k = (random_cu_seqlens(rng, TOKENS, 5) for _ in range(2))
        return {"q": q, "k": k, "v": v, "cu_q": cu_q, "cu_k": cu_k}


def all_cases(world_size: int) -> Iterator[Case]:
    """Every op under every plan that it has the dimensions for, on as many ranks."""
    product = itertools.product(OPS, PLANS, range(len(MASKS)), HEADS, EXCHANGES, (False, True))
    for seed, (op, plan, mask, heads, exchange, return_lse) in enumerate(product):
        kinds = [kind for kind, _ in plan.steps]
        if plan.world_size != world_size or (op == "varlen" and "batch" in kinds):
            continue
        if heads[1] == 1 and kinds[0] == "heads" and len(kinds) > 1:
            continue  # refused: see refuse_mixed_sums
        yield Case(op, plan, mask, heads, exchange, return_lse, seed)


def sample(world_size: int, seed: int) -> list[Case]:
    """For every op, plan and mask one case: other options at random."""
    rng = random.Random(seed)
    cells: dict[tuple[str, Plan, int], list[Case]] = {}
    for case in all_cases(world_size):
        cells.setdefault((case.op, case.plan, case.mask), []).append(case)
    return [rng.choice(cell) for cell in cells.values()]


def check(pool: RankPool, cases: Sequence[Case], timeout: float = 200) -> None:
    """Run the cases and compare outputs, gradients and generated groups."""
    results = pool.run(cases[0].plan.world_size, run_cases, list(cases), timeout=timeout)
    for number, case in enumerate(cases):
        expected = _expected(case)
        for rank, result in enumerate(results):
            tensors, group = result[number]
            assert group == case.plan.groups[rank], f"process_group of rank {rank} in {case}"
            for name, actual in tensors.items():
                assert_close_float64(actual, expected[name], f"{name} of rank {rank} in {case}")


def run_cases(ranks: list[int], cases: list[Case]) -> list[tuple[dict[str, Tensor], Any]]:
    """On one rank: results and gradients of every case, and the generated process_group."""
    return [run_case(case) for case in cases]


def run_case(case: Case) -> tuple[dict[str, Tensor], Any]:
    """One case on this rank."""
    inputs = case.inputs()
    for name in ("q", "k", "v"):
        inputs[name].requires_grad_()
    dims = PACKED_DIMS if case.op == "varlen" else DENSE_DIMS

    def policy(graph: Any, _: Any) -> Any:
        for node in graph.select(ntype=IRFwOperation):
            split(graph, node, case.plan, dims)
        return graph

    with nnscaler_ranks() as nnscaler:
        from nnscaler.ir.operator import IRFwOperation

        model = OneCall(case.op, case.options())
        parallel, code = parallelize(nnscaler, model, inputs, policy, case.plan.plan_ngpus)
        out = parallel(**inputs)
        out, lse = out if case.return_lse else (out, None)
        dout = make_dout(case.seed, inputs["q"], inputs["v"])
        gradients = torch.autograd.grad(out, [inputs[name] for name in ("q", "k", "v")], dout)
    found = dict(zip(("dq", "dk", "dv"), gradients, strict=True), out=out.detach())
    if lse is not None:
        found["lse"] = lse.detach()
    return found, process_group_in(code)


def process_group_in(code: str) -> tuple[int, ...] | None:
    """The one process_group in generated code."""
    (text,) = set(re.findall(r"wrap_\w+\(.*process_group=(None|\([\d, ]+\))", code))
    return None if text == "None" else tuple(int(rank) for rank in re.findall(r"\d+", text))


def _expected(case: Case) -> dict[str, Tensor]:
    inputs = case.inputs()
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    out, lse, dq, dk, dv = dense_gradients(
        q,
        k,
        v,
        make_dout(case.seed, q, v),
        cu_seqlens_q=inputs.get("cu_q"),
        cu_seqlens_k=inputs.get("cu_k"),
        **MASKS[case.mask],
    )
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
