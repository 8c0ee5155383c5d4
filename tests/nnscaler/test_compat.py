"""nnScaler's own ring ops with only the import changed: parameters, plans, their test settings."""

import ast
import importlib.util
import inspect
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nnscaler_ring import policies
from nnscaler_ring.compat import nnscaler as names
from tests.nnscaler.compat_models import DenseCall, PackedCall, Shuffled
from tests.nnscaler.runtime import nnscaler_ranks, parallelize
from tests.oracle import Mods, dense_attention, make_dout, make_qkv
from tests.ranks import RankPool
from tests.tolerances import assert_close_float64, assert_close_relative

THEIRS = {
    "ring_attn": ["wrap_ring_attn_func"],
    "zigzag_attn": ["wrap_zigzag_attn_func"],
    "ring_attn_varlen": ["wrap_ring_attn_varlen_func"],
    "sliding_window_attn": ["wrap_sliding_window_attn_func"],
    "zigzag_allgather_attn_varlen": ["wrap_zigzag_allgather_attn_varlen_func"],
    "maybe_shuffle": ["wrap_maybe_shuffle", "wrap_maybe_unshuffle"],
}


def their_parameters() -> dict[str, dict[str, Any]]:
    """Names, order and defaults in the installed nnScaler, whose ops need flash-attn to import."""
    spec = importlib.util.find_spec("nnscaler")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "customized_ops" / "ring_attention"
    found = {}
    for module, functions in THEIRS.items():
        tree = ast.parse((folder / f"{module}.py").read_text())
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name in functions:
                assert not node.args.kwonlyargs
                parameters = [x.arg for x in node.args.args]
                defaults = [ast.literal_eval(x) for x in node.args.defaults]
                required = [inspect.Parameter.empty] * (len(parameters) - len(defaults))
                found[node.name] = dict(zip(parameters, required + defaults, strict=True))
    return found


def test_same_parameters() -> None:
    theirs = their_parameters()
    assert set(theirs) == set(names.__all__)
    for name, parameters in theirs.items():
        ours = inspect.signature(getattr(names, name)).parameters
        positional = [p for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert [p.name for p in positional] == list(parameters), name
        for p in positional:
            if p.name != "alibi_slopes":  # may be left out here
                assert p.default == parameters[p.name], f"{name}, {p.name}"


Settings = tuple[str, dict[str, Any], tuple[int, int], torch.dtype, int]
# Their small, window, fp16, grouped and multi-query settings, with fewer tokens and head dims.
SETTINGS: dict[str, Settings] = {
    "ring": ("ring", {"causal": True}, (8, 8), torch.bfloat16, 2),
    "ring, window": ("ring", {"causal": True, "window_size": (16, 0)}, (12, 12), torch.bfloat16, 2),
    "ring, not causal": ("ring", {"causal": False}, (12, 12), torch.float16, 4),
    "zigzag, grouped": ("zigzag", {"causal": True}, (32, 4), torch.bfloat16, 4),
    "varlen": ("varlen", {"causal": True}, (8, 8), torch.bfloat16, 2),
    "varlen, lse and slopes": (
        "varlen",
        {"causal": True, "return_lse": True, "max_seqlen_q": 32, "max_seqlen_k": 32},
        (8, 2),
        torch.float64,
        4,
    ),
    "varlen, by heads": (
        "varlen",
        {"causal": True, "enable_ring": False},
        (8, 4),
        torch.float64,
        2,
    ),
    "sliding": ("sliding", {"window_size": (8, 0)}, (12, 1), torch.bfloat16, 2),
}
TOKENS = 64
BOUNDS = torch.tensor([0, 8, 24, 56, 64], dtype=torch.int32)  # an eighth, a quarter, half, the rest


def inputs_of(name: str) -> dict[str, Any]:
    op, options, heads, dtype, _ = SETTINGS[name]
    batch = 2 if op in ("ring", "zigzag") else None
    q, k, v = make_qkv(3, batch, TOKENS, TOKENS, *heads, 8, None, dtype)
    found: dict[str, Any] = {"q": q, "k": k, "v": v}
    if batch is None:
        slopes = torch.linspace(0.1, 0.9, heads[0], dtype=torch.float64)
        found |= {"cu_q": BOUNDS, "cu_k": BOUNDS}
        found["slopes"] = slopes if options.get("return_lse") else None
    return found


def run(ranks: list[int], name: str) -> dict[str, Tensor]:
    """Results and gradients on this rank, the call partitioned as their runners do."""
    op, options, _, _, _ = SETTINGS[name]
    inputs = inputs_of(name)
    packed = "cu_q" in inputs
    leaves = [inputs[x].requires_grad_() for x in ("q", "k", "v")]
    dim = (0 if packed else 1) + ("by heads" in name)

    def policy(graph: Any, _: Any) -> Any:
        for node in graph.select(ntype=IRFwOperation):
            parts = graph.partition(node, node.algorithm("dim"), idx=0, dim=dim, num=len(ranks))
            for device, part in enumerate(parts):
                graph.assign(part, device)
        return graph

    with nnscaler_ranks() as nnscaler:
        from nnscaler.ir.operator import IRFwOperation

        model = (PackedCall if packed else DenseCall)(op, options)
        parallel, code = parallelize(nnscaler, model, inputs, policy, len(ranks))
        found = parallel(*inputs.values())
    group = "None" if "by heads" in name else str(tuple(ranks))
    assert f"process_group={group}" in code
    out, lse = found if isinstance(found, tuple) else (found, None)
    gradients = torch.autograd.grad(out, leaves, make_dout(3, inputs["q"], inputs["v"]))
    results = dict(zip(("dq", "dk", "dv"), gradients, strict=True)) | {"out": out.detach()}
    return results | ({} if lse is None else {"lse": lse.detach()})


def check(pool: RankPool, chosen: list[str]) -> None:
    for name in chosen:
        op, options, _, dtype, ranks = SETTINGS[name]
        inputs = inputs_of(name)
        q, k, v = (inputs[x].requires_grad_() for x in ("q", "k", "v"))
        out, lse = dense_attention(
            q,
            k,
            v,
            causal=options.get("causal", op == "sliding"),
            window_size=options.get("window_size", (-1, -1)),
            cu_seqlens_q=inputs.get("cu_q"),
            mods=Mods(alibi_slopes=inputs.get("slopes")),
        )
        gradients = torch.autograd.grad(out, (q, k, v), make_dout(3, q, v))
        expected = dict(zip(("dq", "dk", "dv"), gradients, strict=True)) | {"out": out, "lse": lse}
        close = assert_close_float64 if dtype == torch.float64 else assert_close_relative
        for found in pool.run(ranks, run, name, timeout=60):
            for key, x in found.items():
                close(x, expected[key], f"{key} of {name}")


@pytest.mark.parametrize("ranks", [2, 4])
def test_their_settings(two_ranks: RankPool, four_ranks: RankPool, ranks: int) -> None:
    chosen = [name for name, settings in SETTINGS.items() if settings[-1] == ranks]
    check(two_ranks if ranks == 2 else four_ranks, chosen)


def shuffled(width: int = 8) -> tuple[Shuffled, dict[str, Tensor]]:
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(2)
    randn = partial(torch.randn, generator=generator, dtype=torch.float64)
    model = Shuffled(width, 2).double()
    inputs = {"x": randn(TOKENS, width), "cu": BOUNDS, "weights": randn(TOKENS, 2, width // 2)}
    return model, inputs


def run_shuffled(ranks: list[int]) -> tuple[Tensor, dict[str, Tensor], str]:
    model, inputs = shuffled()
    policy = partial(policies.shard_sequence, dim=0)
    with nnscaler_ranks() as nnscaler:
        parallel, code = parallelize(nnscaler, model, inputs, policy, len(ranks))
        loss = parallel(**inputs)
        loss.backward()
        parallel.sync_grad()
    full = {local: meta.orig_name for local, meta in parallel.fullmap.items()}
    gradients = {full[name]: x.grad.clone() for name, x in parallel.named_parameters()}
    return loss.detach(), gradients, code


def test_shuffle_under_a_plan(two_ranks: RankPool) -> None:
    """Shuffle, gathered keys, unshuffle: our policy shards all of it."""
    model, inputs = shuffled()
    expected = model(**inputs)
    expected.backward()
    for loss, gradients, code in two_ranks.run(2, run_shuffled, timeout=60):
        assert code.count("process_group=(0, 1)") == 5
        assert_close_float64(loss, expected, "loss")
        for name, x in model.named_parameters():
            assert_close_float64(gradients[name], x.grad, name)


def refused(ranks: list[int]) -> str:
    """A call that must stay on one rank, partitioned by tokens."""
    options = {"causal": True, "enable_ring": False}
    SETTINGS["ring off"] = ("varlen", options, (8, 4), torch.float64, 2)
    try:
        run(ranks, "ring off")
    except RuntimeError as error:
        return str(error.__cause__)
    finally:
        del SETTINGS["ring off"]
    return "nothing"


def test_ring_off_is_not_partitioned(two_ranks: RankPool) -> None:
    message = "enable_ring must be True where nnScaler partitions the tokens"
    assert message in two_ranks.run(2, refused, timeout=30)[0]
