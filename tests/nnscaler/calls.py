"""One attention call under every plan: the product, a rank's part, and the comparison."""

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nnscaler_ring.core.exchange import EXCHANGES as REGISTERED
from nnscaler_ring.masks import Chunks, Window
from tests.nnscaler.models import OneCall
from tests.nnscaler.plans import DENSE_DIMS, PACKED_DIMS, PLANS, Plan, split
from tests.nnscaler.runtime import nnscaler_ranks, parallelize
from tests.oracle import (
    Mods,
    dense_attention,
    dropout_factors,
    make_dout,
    make_qkv,
    random_cu_seqlens,
)
from tests.ranks import RankPool
from tests.tolerances import assert_close_float64

OPS = ("ring", "zigzag", "varlen")
MASKS: tuple[dict[str, Any], ...] = (
    {"causal": True},
    {"causal": False},
    {"causal": True, "window_size": (9, -1)},
    {"causal": False, "window_size": (3, 6)},
    {"mask": str(Chunks(7) | Window(left=2, right=0))},
)
WINDOWS = range(len(MASKS) - 1)
"""Those that every plan is tried with."""
HEADS = ((4, 4), (4, 2), (4, 1), (8, 4))
EXCHANGES = tuple(REGISTERED)
OPTIONS = {"softcap": 2.0, "dropout_p": 0.3, "dropout_seed": 5}
BATCH = 4
TOKENS = 24  # 4 blocks of 6: zigzag chunks of 3, and windows that end inside a block


@dataclass(frozen=True)
class Case:
    """One call of an op under one plan; `everything`: with all options."""

    op: str
    plan: Plan
    mask: int
    heads: tuple[int, int]
    exchange: str
    return_lse: bool
    seed: int
    everything: bool = False

    def __str__(self) -> str:
        return f"{self.op}, {self.plan.name}, {MASKS[self.mask]}, heads {self.heads}"

    def options(self) -> dict[str, Any]:
        """What the model passes beside tensors."""
        usual = {"exchange": self.exchange, "return_lse": self.return_lse, **MASKS[self.mask]}
        return {**usual, **(OPTIONS if self.everything else {})}

    def inputs(self) -> dict[str, Tensor]:
        """q, k, v, and cu_q, cu_k of packed ones; v has its own head dim."""
        batch = None if self.op == "varlen" else BATCH
        q, k, v = make_qkv(self.seed, batch, TOKENS, TOKENS, *self.heads, 4, 6)
        inputs = {"q": q, "k": k, "v": v}
        if self.op == "varlen":
            rng = random.Random(self.seed)
            cu_q, cu_k = (random_cu_seqlens(rng, TOKENS, 5) for _ in range(2))
            inputs |= {"cu_q": cu_q, "cu_k": cu_k}
        if self.everything:
            inputs |= self._optional_tensors()
        return inputs

    def _optional_tensors(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        heads = self.heads[0]
        # Whole, or with a dimension of 1 that every part of the plan holds.
        lead = [(BATCH, heads), (1, heads), (BATCH, 1), (1, 1)][self.seed % 4]
        if len(self.plan.steps) > 1:
            lead = (BATCH, heads)
        lead = lead[1:] if self.op == "varlen" else lead
        per_row = self.op != "varlen" and self.seed % 2 == 0
        shapes = {
            "slopes": (BATCH, heads) if per_row else (heads,),
            "bias": (*lead, TOKENS, TOKENS),
            "sinks": (heads,),
        }
        return {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in shapes.items()
        }


def all_cases(world_size: int) -> Iterator[Case]:
    """Every op under every plan that it has the dimensions for, on as many ranks."""
    product = itertools.product(OPS, PLANS, WINDOWS, HEADS, EXCHANGES, (False, True))
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


def sample_of_masks(world_size: int) -> list[Case]:
    """For every op one plan, with a mask that is no window."""
    of_op: dict[str, Case] = {}
    for case in all_cases(world_size):
        if any(kind == "sequence" for kind, _ in case.plan.steps):
            of_op.setdefault(case.op, replace(case, mask=len(MASKS) - 1))
    return list(of_op.values())


def sample_of_everything(world_size: int, seed: int) -> list[Case]:
    """For every op and plan one case with all options."""
    cells: dict[tuple[str, Plan], Case] = {}
    cases = list(all_cases(world_size))
    random.Random(seed).shuffle(cases)
    for case in cases:
        kinds = [kind for kind, _ in case.plan.steps]
        if "heads" in kinds[1:]:
            continue  # refused, as nnScaler would mix up the gradient of sinks
        cells.setdefault((case.op, case.plan), replace(case, everything=True))
    return list(cells.values())


def check(pool: RankPool, cases: Sequence[Case]) -> None:
    """Run the cases and compare outputs, gradients and generated groups."""
    timeout = 200 + 2 * len(cases)
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
    wanted = [name for name in ("q", "k", "v", "bias", "sinks") if name in inputs]
    for name in wanted:
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
        gradients = torch.autograd.grad(out, [inputs[name] for name in wanted], dout)
    found = {f"d{name}": grad for name, grad in zip(wanted, gradients, strict=True)}
    found["out"] = out.detach()
    if lse is not None:
        found["lse"] = lse.detach()
    return found, process_group_in(code)


def process_group_in(code: str) -> tuple[int, ...] | None:
    """The one process_group in generated code."""
    (text,) = set(re.findall(r"wrap_\w+\(.*process_group=(None|\([\d, ]+\))", code))
    return None if text == "None" else tuple(int(rank) for rank in re.findall(r"\d+", text))


def _expected(case: Case) -> dict[str, Tensor]:
    inputs = case.inputs()
    wanted = [name for name in ("q", "k", "v", "bias", "sinks") if name in inputs]
    for name in wanted:
        inputs[name].requires_grad_()
    q, k, v, bias = (inputs.get(name) for name in ("q", "k", "v", "bias"))
    mods = Mods()
    if case.everything:
        batch = 1 if case.op == "varlen" else BATCH
        mods = Mods(
            OPTIONS["softcap"],
            inputs["slopes"],
            bias[None] if case.op == "varlen" else bias,
            inputs["sinks"],
            dropout_factors(0.3, 5, batch, case.heads[0], TOKENS, TOKENS),
        )
    out, lse = dense_attention(
        q,
        k,
        v,
        cu_seqlens_q=inputs.get("cu_q"),
        cu_seqlens_k=inputs.get("cu_k"),
        mods=mods,
        **MASKS[case.mask],
    )
    dout = make_dout(case.seed, q, v)
    gradients = torch.autograd.grad(out, [inputs[name] for name in wanted], dout)
    found = {f"d{name}": grad for name, grad in zip(wanted, gradients, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **found}
