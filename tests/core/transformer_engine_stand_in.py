"""A stand-in for TransformerEngine: the signatures of each version, and dense float64 attention.

It accepts a call only if that version would (`inspect.Signature.bind`), asserts what the real one
asserts or silently relies on, writes the call down, and computes over the gathered sequence.
"""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler_ring.core.op import transformer_engine
from tests.oracle import dense_attention

# Parameters of DotProductAttention after `self`, from the sources of each release; a default that
# is not written is None. A later version has those of the versions before it.
CONSTRUCTOR = {
    "2.2.0": "num_attention_heads! kv_channels! num_gqa_groups attention_dropout qkv_format "
    "attn_mask_type window_size sequence_parallel tp_size get_rng_state_tracker tp_group "
    "layer_number attention_type cp_group cp_global_ranks cp_stream cp_comm_type softmax_scale",
    "2.8.0": "softmax_type",
    "2.9.0": "return_max_logit",
    "2.12.0": "bottom_right_diagonal",
    "2.16.0": "name",
}
FORWARD = {
    "2.2.0": "query_layer! key_layer! value_layer! attention_mask qkv_format cu_seqlens_q "
    "cu_seqlens_kv cu_seqlens_q_padded cu_seqlens_kv_padded max_seqlen_q max_seqlen_kv "
    "attn_mask_type window_size checkpoint_core_attention core_attention_bias_type "
    "core_attention_bias alibi_slopes fast_zero_fill inference_params pad_between_seqs",
    "2.8.0": "fp8_output",
    "2.10.0": "num_splits",
    "2.12.0": "bottom_right_diagonal",
    "2.17.0": "score_mod score_mod_bprop score_mod_tensors score_mod_bprop_tensors",
    "2.20.0.dev0": "bf16_backward qkv_layer kv_layer qkv_interleave_dim",
}
SET_GROUP = {"2.2.0": "cp_group! cp_global_ranks! cp_stream! cp_comm_type"}
VERSIONS = tuple(f"2.{minor}.0" for minor in range(2, 19))
NEWEST = "2.20.0.dev0"  # the development version in August 2026


def number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def signature(table: dict[str, str], version: str) -> inspect.Signature:
    names = [
        name
        for since, added in table.items()
        if number(since) <= number(version)
        for name in added.split()
    ]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [
            inspect.Parameter(
                name.rstrip("!"), kind, default=inspect._empty if name.endswith("!") else None
            )
            for name in names
        ]
    )


class GatheredRows(torch.autograd.Function):
    """The rows of all ranks one after another; in the backward the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.rows, ctx.group = dim, x.shape[dim], group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x, group=group)
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        total = gradient.contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total.narrow(ctx.dim, ctx.group.rank() * ctx.rows, ctx.rows), None, None


class DotProductAttention:
    """What is bound to a version by `stand_in`."""

    version = ""
    calls: list[dict[str, Any]]

    def __init__(self, *args: Any, **options: Any) -> None:
        self.settings = signature(CONSTRUCTOR, self.version).bind(*args, **options).arguments
        assert self.settings["attention_dropout"] == 0.0

    def set_context_parallel_group(self, *args: Any, **options: Any) -> None:
        self.parallel = signature(SET_GROUP, self.version).bind(*args, **options).arguments
        group = self.parallel["cp_group"]
        assert isinstance(group, dist.ProcessGroup)
        assert self.parallel["cp_global_ranks"] == dist.get_process_group_ranks(group)
        assert self.parallel["cp_comm_type"] == "p2p"

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        given = signature(FORWARD, self.version).bind(*args, **options).arguments
        self.calls.append({**self.settings, **given})
        q, k, v = (given[f"{name}_layer"] for name in ("query", "key", "value"))
        assert all(x.is_contiguous() for x in (q, k, v))
        assert q.shape[-1] == self.settings["kv_channels"] and q.shape[-1] % 8 == 0
        assert q.shape[-2] == self.settings["num_attention_heads"]
        assert k.shape[-2] == v.shape[-2] == self.settings["num_gqa_groups"]
        form, mask = self.settings["qkv_format"], self.settings["attn_mask_type"]
        ranks = self.parallel["cp_group"].size()
        if form == "bshd":
            assert mask in ("causal", "no_mask") and q.dim() == 4
            assert not {name for name in given if name.startswith(("max_", "cu_"))}
            bounds = [0, q.shape[1] * ranks]
        else:
            assert form == "thd" and mask in ("padding_causal", "padding") and q.dim() == 3
            cu_seqlens = given["cu_seqlens_q"]
            assert cu_seqlens.dtype == torch.int32
            for name in ("cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded"):
                assert given[name] is cu_seqlens, name
            bounds = cu_seqlens.tolist()
            lengths = cu_seqlens.diff()
            assert given["max_seqlen_q"] == given["max_seqlen_kv"] == int(lengths.max())
        return self.compute(q, k, v, bounds, causal="causal" in mask)

    def compute(
        self, q: Tensor, k: Tensor, v: Tensor, bounds: list[int], *, causal: bool
    ) -> Tensor:
        dim, group = q.dim() - 3, self.parallel["cp_group"]
        held = [tokens_of(rank, bounds, group.size()) for rank in range(group.size())]
        order = torch.cat(held).argsort()
        out, _ = dense_attention(
            *(GatheredRows.apply(x, dim, group).index_select(dim, order) for x in (q, k, v)),
            softmax_scale=self.settings["softmax_scale"],
            causal=causal,
            cu_seqlens_q=bounds if dim == 0 else None,
        )
        return out.index_select(dim, held[group.rank()]).to(q.dtype).flatten(-2)


def tokens_of(rank: int, bounds: list[int], ranks: int) -> Tensor:
    """The tokens whose rows TransformerEngine takes a rank to hold."""
    runs = []
    for start, stop in pairwise(bounds):
        assert (stop - start) % (2 * ranks) == 0, bounds
        chunk = (stop - start) // (2 * ranks)
        for n in (rank, 2 * ranks - 1 - rank):
            runs.append(torch.arange(start + n * chunk, start + (n + 1) * chunk))
    return torch.cat(runs)


@contextmanager
def stand_in(version: str) -> Iterator[list[dict[str, Any]]]:
    """TransformerEngine of a version, for CPU ranks over gloo; yields the calls that it gets."""
    calls: list[dict[str, Any]] = []
    bound = type(
        "DotProductAttention", (DotProductAttention,), {"version": version, "calls": calls}
    )
    package, pytorch = ModuleType("transformer_engine"), ModuleType("transformer_engine.pytorch")
    pytorch.DotProductAttention = bound  # type: ignore[attr-defined]
    package.pytorch = pytorch  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "transformer_engine", package)
        patch.setitem(sys.modules, "transformer_engine.pytorch", pytorch)
        patch.setattr(transformer_engine.importlib.metadata, "version", lambda name: version)
        patch.setattr(transformer_engine, "DEVICE_TYPE", "cpu")
        patch.setattr(transformer_engine, "BACKEND", "gloo")
        patch.setattr(transformer_engine, "DTYPES", (torch.float64, torch.bfloat16))
        patch.setattr(transformer_engine, "_stream", lambda device: None)
        transformer_engine._attention_module.cache_clear()
        yield calls
    transformer_engine._attention_module.cache_clear()
