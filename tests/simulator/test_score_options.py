"""Softcap, ALiBi, bias, sinks and dropout: simulated as the distributed run computes them."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler_ring.simulator import (
    GeneratedInputs,
    RingAttentionMemoryProfiler,
    RingAttentionSimulator,
    ScoreOptions,
    SimulatedCall,
    Sizes,
)
from tests.cases import Case, all_cases, call
from tests.ranks import RankPool
from tests.simulator.test_simulator import rows_of, simulated

LENS = (7, 0, 6)
TOKENS = sum(LENS)
NAMES = ("out", "softmax_lse", "dq", "dk", "dv", "dbias")


def case_of(exchange: str) -> Case:
    """Uneven shards, one of them empty, two heads of keys for six of queries, a window."""
    found = next(c for c in all_cases(1) if c.op == "ring" and c.world_size == 3)
    return replace(
        found,
        exchange=exchange,
        kernel="torch_cpu",
        shard_lens=LENS,
        shard_lens_k=LENS,
        heads=(6, 2),
        causal=False,
        window_size=(4, 5),
    )


def options(name: str, dtype: torch.dtype) -> ScoreOptions:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "softcap": ScoreOptions(softcap=1.5),
        "alibi_slopes": ScoreOptions(alibi_slopes=normal(6).abs()),
        "bias": ScoreOptions(bias=normal(1, 6, TOKENS, TOKENS).requires_grad_()),
        "sinks": ScoreOptions(sinks=normal(6)),
        "dropout": ScoreOptions(dropout_p=0.3, dropout_seed=7),
        "all": ScoreOptions(
            softcap=2.0,
            alibi_slopes=normal(6).abs(),
            bias=normal(1, 1, TOKENS, TOKENS).requires_grad_(),
            sinks=normal(6),
            dropout_p=0.2,
            dropout_seed=-1,
        ),
    }[name]


def distributed(ranks: list[int], cases: list[tuple[Case, str]], dtype: torch.dtype) -> list:
    """On one rank: its rows of out, lse, dq, dk, dv, dbias, and its part of dsinks."""
    block = ranks.index(dist.get_rank())
    found = []
    for case, name in cases:
        rows = rows_of(case, block)
        q, k, v, dout = (x.index_select(1, rows) for x in case.inputs(dtype))
        given = {n: getattr(options(name, dtype), n) for n in ScoreOptions.__dataclass_fields__}
        leaves = {"q": q, "k": k, "v": v}
        if given["bias"] is not None:
            given["bias"] = leaves["bias"] = given["bias"].detach()[..., rows, :]
        if given["sinks"] is not None:
            leaves["sinks"] = given["sinks"]
        for x in leaves.values():
            x.requires_grad_()
        out, lse = call(case, q, k, v, ranks, **given)
        gradients = dict(
            zip(leaves, torch.autograd.grad(out, [*leaves.values()], dout), strict=True)
        )
        results = {"out": out.detach(), "softmax_lse": lse.detach()}
        found.append(results | {f"d{name}": x for name, x in gradients.items()})
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("exchange", ["direct", "ring", "all_gather"])
def test_options_are_the_bits_of_the_distributed_run(
    pool: RankPool, exchange: str, dtype: torch.dtype
) -> None:
    names = ["softcap", "alibi_slopes", "bias", "sinks", "dropout", "all"]
    case = case_of(exchange)
    shards = pool.run(3, distributed, [(case, name) for name in names], dtype, timeout=120)
    for number, name in enumerate(names):
        plain = simulated(case, str(dtype).removeprefix("torch."))
        given = options(name, dtype)
        simulator = RingAttentionSimulator(plain.call, plain.inputs, options=given)
        results = simulator.all_ranks(backward=True)._asdict()
        assert not torch.equal(results["dk"], plain.all_ranks(backward=True).dk), name
        for block, shard in enumerate(shards):
            for what, real in shard[number].items():
                if what != "dsinks":
                    dim = 2 if what in ("softmax_lse", "dbias") else 1
                    mine = results[what].index_select(dim, rows_of(case, block))
                    assert torch.equal(real, mine), (name, what, block)
            share = simulator.rank_share(block, backward=True)
            for what in ("dk", "dbias", "dsinks"):
                real, alone = shard[number].get(what), getattr(share, what)
                assert (real is None) == (alone is None), (name, what)
                assert real is None or torch.equal(real, alone), (name, what, block)
        if given.sinks is not None:
            parts = [shard[number]["dsinks"] for shard in shards]
            assert torch.equal(results["dsinks"], sum(parts[1:], parts[0])), name


SIZES = Sizes(2, 2, 4, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"softcap": -1.0}, "softcap must be finite and >= 0"),
        ({"alibi_slopes": torch.ones(3)}, "alibi_slopes must be"),
        ({"bias": torch.ones(1, 1, 8, 7)}, "bias must have a column for each of the 8 keys"),
        ({"sinks": torch.ones(3)}, "sinks must be"),
        ({"dropout_p": 1.0}, "dropout_p must be in"),
        ({"dropout_p": 0.5}, "dropout_seed must be an int where dropout_p is not 0"),
        ({"dropout_seed": 5}, "dropout_seed must be None where dropout_p is 0.0"),
    ],
)
def test_what_the_ops_refuse_is_refused(given: dict, message: str) -> None:
    call = SimulatedCall(8, 2, SIZES)
    with pytest.raises(ValueError, match=message):
        RingAttentionSimulator(call, GeneratedInputs(SIZES), options=ScoreOptions(**given))


def test_memory_is_counted_but_not_foretold() -> None:
    bias = torch.zeros(1, 1, 8, 8)
    simulator = RingAttentionSimulator(
        SimulatedCall(8, 2, SIZES), GeneratedInputs(SIZES), options=ScoreOptions(bias=bias)
    )
    usage = RingAttentionMemoryProfiler(simulator).profile_memory_usage()
    assert usage["bias_memory"] == 4 * 8 * 4, "this rank's rows of it"
    assert "predicted_total_memory" not in usage
