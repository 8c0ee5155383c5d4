"""TransformerEngine's call as each version accepts it, its results, and everything it refuses."""

import sys
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler_ring import wrap_ring_attn_func, wrap_ring_attn_varlen_func, wrap_zigzag_attn_func
from nnscaler_ring.core.op import transformer_engine
from nnscaler_ring.core.plan.layout import LAYOUTS, SequenceLayout, ZigzagDocuments
from nnscaler_ring.core.token_index import token_index
from tests.core.transformer_engine_stand_in import NEWEST, VERSIONS, stand_in
from tests.oracle import dense_gradients, make_dout, make_qkv
from tests.tolerances import assert_close_float64

RING = {"kernel": "transformer_engine", "exchange": "ring"}


@dataclass(frozen=True)
class Case:
    """One call: shards as the caller holds them, documents or None."""

    lens: tuple[int, ...]
    layout: str = "contiguous"
    causal: bool = True
    heads: tuple[int, int] = (4, 2)
    cu_seqlens: tuple[int, ...] | None = None
    softmax_scale: float | None = None

    @property
    def held(self) -> SequenceLayout:
        return LAYOUTS[self.layout].for_shards(self.lens)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch = None if self.cu_seqlens else 2
        q, k, v = make_qkv(3, batch, sum(self.lens), sum(self.lens), *self.heads, 8)
        return q, k, v, make_dout(3, q, v)

    def rows(self, block: int) -> Tensor:
        return token_index(self.held.positions(block))


CASES = {
    "zigzag order": Case((8, 8), "zigzag"),
    "contiguous": Case((8, 8)),
    "contiguous, uneven, full": Case((13, 3), causal=False, softmax_scale=0.3),
    "3 ranks": Case((12, 0, 6), heads=(6, 2)),
    "3 ranks, one head": Case((4, 4, 4), "zigzag", causal=False, heads=(1, 1)),
    "documents": Case((10, 10), cu_seqlens=(0, 4, 16, 20), heads=(2, 1)),
    "documents, full, uneven": Case((19, 5), causal=False, cu_seqlens=(0, 20, 24)),
    "documents, 3 ranks": Case((0, 20, 10), cu_seqlens=(0, 6, 24, 30), softmax_scale=0.2),
}


def attention(case: Case, q: Tensor, k: Tensor, v: Tensor, group: Any, **options: Any) -> Any:
    uneven = None if len(set(case.lens)) == 1 else list(case.lens)
    options = {
        "causal": case.causal,
        "softmax_scale": case.softmax_scale,
        "process_group": group,
        "shard_lens": uneven,
        **RING,
        **options,
    }
    if case.cu_seqlens is None:
        return wrap_zigzag_attn_func(q, k, v, layout=case.layout, **options)
    cu_seqlens = torch.tensor(case.cu_seqlens, dtype=torch.int32)
    return wrap_ring_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, **options)


def run(ranks: list[int], cases: list[Case], version: str) -> tuple[list[list[Tensor]], list[dict]]:
    """On one rank: out, dq, dk, dv of every case, and the settings of every call."""
    block = ranks.index(dist.get_rank())
    results = []
    with stand_in(version) as calls:
        for case in cases:
            q, k, v, dout = (x.index_select(x.dim() - 3, case.rows(block)) for x in case.inputs())
            q, k, v = (x.requires_grad_() for x in (q, k, v))
            out = attention(case, q, k, v, ranks)
            results.append([out.detach(), *torch.autograd.grad(out, (q, k, v), dout)])
    plain = [{n: x for n, x in call.items() if not isinstance(x, Tensor)} for call in calls]
    return results, plain


@pytest.mark.parametrize("ranks", [2, 3])
def test_results_equal_dense(pool, ranks):
    cases = [case for case in CASES.values() if len(case.lens) == ranks]
    shards = pool.run(ranks, run, cases, NEWEST)
    for number, case in enumerate(cases):
        options = {"causal": case.causal, "softmax_scale": case.softmax_scale}
        out, _, *gradients = dense_gradients(
            *case.inputs(), cu_seqlens_q=case.cu_seqlens, **options
        )
        for block, (results, _) in enumerate(shards):
            for name, actual, dense in zip(
                ("out", "dq", "dk", "dv"), results[number], (out, *gradients), strict=True
            ):
                expected = dense.index_select(dense.dim() - 3, case.rows(block))
                assert_close_float64(actual, expected, f"{name} of block {block} in {case}")


def test_every_version_accepts_the_calls(pool):
    cases = [CASES["contiguous"], CASES["documents"]]
    for version in (*VERSIONS, NEWEST):
        for _, (dense, packed) in pool.run(2, run, cases, version):
            assert (dense["qkv_format"], dense["attn_mask_type"]) == ("bshd", "causal")
            assert (packed["qkv_format"], packed["attn_mask_type"]) == ("thd", "padding_causal")
            assert packed["max_seqlen_q"] == 12, version


def test_zigzag_documents():
    layout = ZigzagDocuments((0, 8, 8, 12), 2)
    assert layout.shard_lens == (6, 6)
    rows = [[s.position + n for s in layout.spans(r) for n in range(s.length)] for r in (0, 1)]
    assert rows == [[0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10]]


# What it refuses: one call each that differs from a good one.

GOOD = Case((8, 8), "zigzag")
SLOPES = torch.ones(4)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "exchange": ({"exchange": "direct"}, "exchange must be 'ring'.* it is 'direct'"),
    "window": ({"window_size": (4, 0)}, r"window_size must be \(-1, -1\)"),
    "softcap": ({"softcap": 5.0}, "it is not given softcap"),
    "alibi": ({"alibi_slopes": SLOPES}, "it is not given alibi_slopes"),
    "sinks": ({"sinks": torch.ones(4, dtype=torch.float64)}, "it is not given sinks"),
    "bias": ({"bias": torch.ones(1, 1, 8, 16, dtype=torch.float64)}, "it is not given bias"),
    "dropout": ({"dropout_p": 0.1}, "dropout_p must be 0"),
    "deterministic": ({"deterministic": True}, "deterministic must be False"),
    "lse": ({"return_lse": True}, "return_lse must be False"),
}


def refusals(ranks: list[int]) -> dict[str, str]:
    """On one rank: what each refused call says."""

    def message(call: Any) -> str:
        with pytest.raises(ValueError, match="transformer_engine") as refusal:
            call()
        return str(refusal.value)

    q, k, v, _ = (x[:, GOOD.rows(ranks.index(dist.get_rank()))] for x in GOOD.inputs())
    good = {"layout": "zigzag", "process_group": ranks, **RING}
    zigzag, ring, varlen = wrap_zigzag_attn_func, wrap_ring_attn_func, wrap_ring_attn_varlen_func
    packed = [x[0] for x in (q, k, v)]
    cu = torch.tensor([0, 4, 16], dtype=torch.int32)
    odd = torch.tensor([0, 6, 16], dtype=torch.int32)
    empty = torch.tensor([0, 16, 16], dtype=torch.int32)
    wide = torch.zeros(1, 8, 4, 12, dtype=torch.float64)
    half = torch.zeros(1, 8, 4, 8, dtype=torch.float32)
    alone = {**good, "process_group": None}
    backwards = {**good, "process_group": ranks[::-1]}
    fewer = [x[:, :7].contiguous() for x in (q, k, v)]
    packed_group = {"process_group": ranks, **RING}
    with stand_in(NEWEST):
        found = {
            name: message(lambda options=options: zigzag(q, k, v, **{**good, **options}))
            for name, (options, _) in REFUSED.items()
        }
        found |= {
            "contiguous": message(lambda: ring(q, k, v, process_group=ranks, **RING)),
            "alone": message(lambda: zigzag(q, k, v, **alone)),
            "order": message(lambda: zigzag(q, k, v, **backwards)),
            "head_dim": message(lambda: zigzag(wide, wide, wide, **good)),
            "v_head_dim": message(lambda: zigzag(q, k, v[..., :4], **good)),
            "dtype": message(lambda: zigzag(half, half, half, **good)),
            "tokens": message(lambda: zigzag(*fewer, **good)),
            "document": message(lambda: varlen(*packed, odd, odd, **packed_group)),
            "empty document": message(lambda: varlen(*packed, empty, empty, **packed_group)),
            "keys": message(lambda: varlen(*packed, cu, empty, **packed_group)),
        }
    found["device"] = message(lambda: zigzag(q, k, v, **good))
    with stand_in(NEWEST), pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer_engine, "BACKEND", "nccl")
        found["backend"] = message(lambda: zigzag(q, k, v, **good))
    with stand_in("2.1.0"):
        found["version"] = message(lambda: zigzag(q, k, v, **good))
    with stand_in(NEWEST), pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer_engine.importlib, "import_module", broken)
        found["broken"] = message(lambda: zigzag(q, k, v, **good))
    return found


def broken(name: str) -> ModuleType:
    raise OSError(f"libtransformer_engine.so is missing for {name}")


OTHERS = {
    "contiguous": "zigzag order: use wrap_zigzag_attn_func",
    "alone": "process_group must have at least 2 ranks",
    "order": r"in the order \[1, 0\]",
    "head_dim": "multiple of 8 and at most 256, it is 12",
    "v_head_dim": "v_head_dim must be head_dim, 8, it is 4",
    "dtype": r"not in torch\.float32",
    "tokens": "the total of tokens must be a multiple of 4.* it is 14",
    "document": "the length of document 0 must be a multiple of 4.* it is 6",
    "empty document": "the length of document 1 .* not 0",
    "keys": "cu_seqlens_k and shard_lens_k must be those of q",
    "device": "it computes on cuda, the tensors are on cpu",
    "backend": "must use nccl for cpu tensors, it uses gloo",
    "version": "must be 2.2 or newer, it is 2.1.0",
    "broken": r"cannot be imported: libtransformer_engine\.so is missing",
}


def test_refusals_name_the_reason_on_every_rank(pool):
    expected = {name: pattern for name, (_, pattern) in REFUSED.items()} | OTHERS
    for found in pool.run(2, refusals):
        assert set(found) == set(expected)
        for name, pattern in expected.items():
            start = "kernel='transformer_engine' cannot compute this call "
            assert found[name].startswith(start) or f": ValueError: {start}" in found[name], found
            assert_matches(pattern, found[name])


def assert_matches(pattern: str, text: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    monkeypatch.setattr(transformer_engine, "DEVICE_TYPE", "cpu")
    reason = transformer_engine._is_not_installed()
    assert reason and "pip install" in reason


def test_auto_never_takes_it():
    q, k, v, _ = replace(GOOD, lens=(16,)).inputs()
    with stand_in(NEWEST) as calls:
        wrap_zigzag_attn_func(q, k, v)
    assert not calls


def test_under_compile_it_says_so():
    from torch._dynamo.exc import Unsupported

    q, k, v, _ = GOOD.inputs()
    compiled = torch.compile(wrap_zigzag_attn_func, backend="eager", fullgraph=True)
    with pytest.raises((NotImplementedError, Unsupported), match="torch.compile"):
        compiled(q, k, v, **RING)
