"""Calls that cover every pair of the contract's options, and their comparison with dense float64.

A call is a choice of one value per factor. `covering(strength)` makes few choices in which every
combination of values of `strength` factors occurs that can occur at all.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.cases import EXCHANGES, Case, call, make_documents, make_shard_lens, rows_of
from tests.masks import random_mask
from tests.oracle import Mods, dense_attention, dropout_factors
from tests.ranks import RankPool
from tests.tolerances import assert_close_float64, assert_close_relative

FACTORS: dict[str, tuple[Any, ...]] = {
    "op": ("ring", "zigzag", "zigzag in zigzag order", "varlen"),
    "exchange": EXCHANGES,
    "ranks": ((0,), (0, 1), (3, 1), (0, 1, 2), (3, 0, 2), (0, 1, 2, 3), (2, 0, 3, 1)),
    "shards": ("equal", "uneven", "one empty", "one token"),
    "causal": (True, False),
    "window_size": ((-1, -1), (3, -1), (5, 2), (0, 0), (40, 40)),
    "mask": (None, "any", "any"),
    "heads": ((2, 2), (6, 2), (4, 1)),
    "head_dims": ((4, 4), (3, 6), (5, 2)),
    "softcap": (0.0, 1.5),
    "alibi_slopes": (None, "heads", "batch and heads"),
    "bias": (None, "everywhere", "one head", "one batch row"),
    "sinks": (False, True),
    "dropout_p": (0.0, 0.4),
    "loss": ("out", "out and lse", "lse"),
    "dtype": (torch.float64, torch.float64, torch.float32, torch.bfloat16),
    "kernel": ("auto", "reference"),
    "deterministic": (False, True),
}
"""Names of factors and their values. float64 stands twice: it is the one that sees small errors."""

Choice = tuple[int, ...]
"""One value per factor, by its number."""


@dataclass(frozen=True)
class Contract:
    """One call with options over the ranks `ranks`, in block order."""

    case: Case
    ranks: tuple[int, ...]
    softcap: float
    alibi_slopes: str | None
    bias: str | None
    sinks: bool
    dropout_p: float
    loss: str
    dtype: torch.dtype
    deterministic: bool

    def on(self, device: str) -> "Contract":
        """With the device's kernel; what computes float64 there is not deterministic."""
        if device == "cpu":
            return self
        return replace(self, case=self.case.on(device), deterministic=False)

    def batch(self) -> int:
        """Rows of the batch; packed tensors count as one."""
        return 1 if self.case.op == "varlen" else 1 + self.case.seed % 2

    def tensors(self) -> dict[str, Tensor | None]:
        """alibi_slopes, bias and sinks of the whole sequence, the same on every rank."""
        generator = torch.Generator().manual_seed(self.case.seed + 77)
        heads, packed = self.case.heads[0], self.case.op == "varlen"
        bias_batch = 1 if self.bias == "one batch row" else self.batch()
        bias_heads = 1 if self.bias == "one head" else heads
        tokens = sum(self.case.shard_lens), sum(self.case.shard_lens_k)
        slopes = (self.batch(), heads) if self.alibi_slopes == "batch and heads" else (heads,)
        bias_shape = (bias_heads, *tokens) if packed else (bias_batch, bias_heads, *tokens)
        shapes = {
            "alibi_slopes": slopes if self.alibi_slopes else None,
            "bias": bias_shape if self.bias else None,
            "sinks": (heads,) if self.sinks else None,
        }
        return {
            name: None
            if shape is None
            else torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)
            for name, shape in shapes.items()
        }

    def dlse(self) -> Tensor:
        """A gradient of the lse: [batch, heads, tokens], packed [heads, tokens]."""
        generator = torch.Generator().manual_seed(self.case.seed + 78)
        shape = (self.case.heads[0], sum(self.case.shard_lens))
        lead = () if self.case.op == "varlen" else (self.batch(),)
        return torch.randn((*lead, *shape), generator=generator, dtype=torch.float64)


def covering(strength: int, seed: int, attempts: int = 40) -> list[Contract]:
    """Few contracts in which every combination of `strength` factors' values occurs."""
    rng = random.Random(seed)
    sizes = [len(values) for values in FACTORS.values()]
    missing = {
        tuple(zip(factors, values, strict=True))
        for factors in itertools.combinations(range(len(sizes)), strength)
        for values in itertools.product(*(range(sizes[factor]) for factor in factors))
        if _is_possible(dict(zip(factors, values, strict=True)))
    }
    contracts = []
    while missing:
        # Each candidate holds one missing combination; the one that covers most others is taken.
        wanted = sorted(rng.sample(sorted(missing), min(attempts, len(missing))))
        choices = [_complete(dict(one), sizes, rng) for one in wanted]
        best = max(choices, key=lambda choice: len(missing & set(_parts(choice, strength))))
        missing -= set(_parts(best, strength))
        contracts.append(_contract(best, rng, seed=1000 * seed + len(contracts)))
    return contracts


def _parts(choice: Choice, strength: int) -> Iterator[tuple[tuple[int, int], ...]]:
    return itertools.combinations(enumerate(choice), strength)


def _complete(chosen: dict[int, int], sizes: Sequence[int], rng: random.Random) -> Choice:
    while True:
        choice = [chosen.get(factor, rng.randrange(size)) for factor, size in enumerate(sizes)]
        if _is_possible(dict(enumerate(choice))):
            return tuple(choice)


def _is_possible(chosen: dict[int, int]) -> bool:
    values = {
        name: FACTORS[name][chosen[number]]
        for number, name in enumerate(FACTORS)
        if number in chosen
    }
    # A packed call has no batch to give slopes or a bias to.
    packed = values.get("op") == "varlen"
    slopes, bias = values.get("alibi_slopes"), values.get("bias")
    if packed and (slopes == "batch and heads" or bias == "one batch row"):
        return False
    # A mask takes the place of both.
    window = values.get("causal", True), values.get("window_size", (-1, -1))
    return values.get("mask") is None or window == (True, (-1, -1))


def _contract(choice: Choice, rng: random.Random, seed: int) -> Contract:
    values = {
        name: options[number]
        for (name, options), number in zip(FACTORS.items(), choice, strict=True)
    }
    op, ranks = values.pop("op"), values.pop("ranks")
    lens = make_shard_lens(rng, values.pop("shards"), len(ranks))
    case = Case(
        op=op,
        world_size=len(ranks),
        shard_lens=tuple(lens),
        **make_documents(rng, op, lens, len(ranks)),
        seed=seed,
        head_dim=values["head_dims"][0],
        v_head_dim=values.pop("head_dims")[1],
        **{name: values.pop(name) for name in ("exchange", "causal", "window_size", "heads")},
        kernel=values.pop("kernel"),
    )
    if values.pop("mask"):
        packed = op == "varlen"
        case = replace(case, mask=random_mask(rng, sum(lens), packed=packed).text)
    if op == "zigzag in zigzag order":
        case = case.in_zigzag_order()
    return Contract(case=case, ranks=ranks, **values)


def check(pool: RankPool, contracts: Sequence[Contract], device: str = "cpu") -> None:
    """Run every contract on its ranks and compare all results with dense float64 attention."""
    by_ranks: dict[tuple[int, ...], list[Contract]] = {}
    for contract in (contract.on(device) for contract in contracts):
        by_ranks.setdefault(contract.ranks, []).append(contract)
    for ranks, group in by_ranks.items():
        shards = pool.run(None, run_contracts, group, device, ranks=list(ranks), timeout=300)
        for number, contract in enumerate(group):
            compare(contract, [shard[number] for shard in shards])


def run_contracts(
    ranks: list[int], contracts: list[Contract], device: str
) -> list[dict[str, Tensor]]:
    """On one rank: what it gets for every contract."""
    block = ranks.index(torch.distributed.get_rank())
    group = ranks if len(ranks) > 1 else None
    return [run_contract(contract, block, group, device) for contract in contracts]


def run_contract(
    contract: Contract, block: int, group: list[int] | None, device: str = "cpu"
) -> dict[str, Tensor]:
    """out, lse and all gradients of the rank that holds `block`, on the CPU; dsinks is its part."""
    case = contract.case
    q, k, v, dout = case.inputs(contract.dtype)
    rows, rows_k = rows_of(case, block), rows_of(case, block, keys=True)
    q, dout = (x.index_select(-3, rows) for x in (q, dout))
    k, v = (x.index_select(-3, rows_k) for x in (k, v))
    tensors = contract.tensors()
    if tensors["bias"] is not None:
        tensors["bias"] = tensors["bias"].index_select(-2, rows)
    tensors = {name: None if x is None else x.to(device) for name, x in tensors.items()}
    q, k, v, dout = (x.to(device) for x in (q, k, v, dout))
    wanted = {"q": q, "k": k, "v": v, "bias": tensors["bias"], "sinks": tensors["sinks"]}
    wanted = {name: x.requires_grad_() for name, x in wanted.items() if x is not None}
    out, lse = call(
        case,
        q,
        k,
        v,
        group,
        **tensors,
        softcap=contract.softcap,
        dropout_p=contract.dropout_p,
        dropout_seed=case.seed if contract.dropout_p else None,
        deterministic=contract.deterministic,
    )
    dlse = contract.dlse().index_select(-1, rows).to(lse)
    losses = {"out": ([out], [dout]), "lse": ([lse], [dlse])}
    losses["out and lse"] = ([out, lse], [dout, dlse])
    results, gradients = losses[contract.loss]
    found = torch.autograd.grad(results, list(wanted.values()), gradients)
    named = {f"d{name}": grad.cpu() for name, grad in zip(wanted, found, strict=True)}
    return {"out": out.detach().cpu(), "lse": lse.detach().cpu(), **named}


def dense(contract: Contract) -> dict[str, Tensor]:
    """The same for the whole sequence, in float64."""
    case = contract.case
    *qkv, dout = case.inputs(contract.dtype)
    tensors = contract.tensors()
    inputs = {"q": qkv[0], "k": qkv[1], "v": qkv[2], **tensors}
    inputs = {n: x.to(torch.float64).requires_grad_() for n, x in inputs.items() if x is not None}
    factors = None
    if contract.dropout_p:
        shape = (contract.batch(), case.heads[0], sum(case.shard_lens), sum(case.shard_lens_k))
        factors = dropout_factors(contract.dropout_p, case.seed, *shape)
    bias = inputs.get("bias")
    mods = Mods(
        contract.softcap,
        inputs.pop("alibi_slopes", None),
        bias[None] if bias is not None and bias.dim() == 3 else bias,
        inputs.get("sinks"),
        factors,
    )
    out, lse = dense_attention(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        causal=case.causal,
        window_size=case.window_size,
        mask=case.mask,
        cu_seqlens_q=case.cu_seqlens_q,
        cu_seqlens_k=case.cu_seqlens_k,
        mods=mods,
    )
    dlse = contract.dlse()
    # A row that sees nothing has an lse of -inf, a constant.
    lse_loss = (torch.where(lse == -torch.inf, 0.0, lse) * dlse).sum()
    out_loss = (out * dout.to(torch.float64)).sum()
    loss = {"out": out_loss, "lse": lse_loss, "out and lse": out_loss + lse_loss}[contract.loss]
    found = torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True)
    named = {f"d{name}": grad for name, grad in zip(inputs, found, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **named}


def compare(contract: Contract, shards: Sequence[dict[str, Tensor]]) -> None:
    """Every block's rows of every result; the parts of dsinks summed."""
    expected, case = dense(contract), contract.case
    assert {name for shard in shards for name in shard} == set(expected), contract
    if contract.sinks:
        whole = sum(shard["dsinks"].to(torch.float64) for shard in shards)
        assert isinstance(whole, Tensor)
        _assert_close(contract, whole.to(contract.dtype), expected["dsinks"], "dsinks")
    for block, shard in enumerate(shards):
        for name, actual in shard.items():
            if name == "dsinks":
                continue
            dim = {"lse": -1, "dbias": -2}.get(name, -3)
            rows = rows_of(case, block, keys=name in ("dk", "dv"))
            wanted = expected[name].index_select(dim, rows)
            _assert_close(contract, actual, wanted, f"{name} of block {block}")


def _assert_close(contract: Contract, actual: Tensor, expected: Tensor, what: str) -> None:
    what = f"{what} of {contract}"
    if contract.dtype == torch.float64:
        assert_close_float64(actual, expected, what)
        return
    visible = expected != -torch.inf
    assert torch.equal(actual != -torch.inf, visible), what
    assert bool(torch.isfinite(actual[visible]).all()), what
    # The lse is float32 also where it comes from half-precision inputs.
    assert_close_relative(
        actual[visible].to(contract.dtype), expected[visible], what, floor=expected.numel() ** 0.5
    )
