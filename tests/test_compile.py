"""torch.compile, export and activation checkpointing see each call of an op as one step."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import nnscaler_ring
from nnscaler_ring import wrap_ring_attn_func, wrap_ring_attn_varlen_func, wrap_zigzag_attn_func
from nnscaler_ring.masks import Chunks, Prefix
from tests.oracle import make_dout, make_qkv

NAMES = ("ring", "zigzag", "varlen")
TOKENS = 8  # of each rank


def attend(name: str, q: Tensor, k: Tensor, v: Tensor, cu: Tensor, **options: Any) -> Tensor:
    """A public op on [1, tokens, heads, head_dim]."""
    if name == "varlen":
        if "mask" not in options:
            options["causal"] = True
        out = wrap_ring_attn_varlen_func(q[0], k[0], v[0], cu, cu, **options)
        return out[None]
    function = wrap_ring_attn_func if name == "ring" else wrap_zigzag_attn_func
    return function(q, k, v, **options)


def inputs(rank: int, heads: int = 2) -> list[Tensor]:
    """q, k, v, dout of one rank."""
    q, k, v = make_qkv(rank, 1, TOKENS, TOKENS, heads, heads, 4)
    return [q, k, v, make_dout(rank, q, v)]


def results(function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, dout: Tensor):
    """The result of a function of q, k, v, and their gradients."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out = function(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def group_as(kind: str, ranks: list[int]) -> Any:
    """The ranks as a user may give them."""
    if kind == "ranks":
        return ranks
    if kind == "ProcessGroup":
        return dist.new_group(ranks)
    return DeviceMesh("cpu", ranks)


def compare_with_eager(ranks: list[int], kind: str) -> None:
    """On one rank: every op compiled whole, with and without options, equals itself eager."""
    group = group_as(kind, ranks)
    q, k, v, dout = inputs(dist.get_rank())
    cu = torch.tensor([0, 3, TOKENS * len(ranks)])
    window: dict[str, Any] = {"window_size": (3, 0), "shard_lens": [TOKENS] * len(ranks)}
    options: dict[str, Any] = {
        "softcap": 3.0,
        "alibi_slopes": torch.tensor([0.1, 0.2]),
        "sinks": torch.tensor([0.5, -0.5]),
        "dropout_p": 0.2,
        "dropout_seed": 3,
    }
    mask = {"mask": Chunks(3) | Prefix(2)}
    for name, more in itertools.product(NAMES, ({}, window, mask, options)):

        def model(q: Tensor, k: Tensor, v: Tensor, name: str = name, more: Any = more) -> Tensor:
            return attend(name, 2 * q, k, v, cu, process_group=group, **more) * 3

        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        eager = results(model, q, k, v, dout)
        for one, other in zip(eager, results(compiled, q, k, v, dout), strict=True):
            assert torch.equal(one, other), (name, more)


@pytest.mark.parametrize("kind", ["ranks", "ProcessGroup", "DeviceMesh"])
def test_compiled_equals_eager(pool, kind):
    pool.run(2, compare_with_eager, kind, timeout=240)


def count_compilations(ranks: list[int]) -> tuple[int, float]:
    """On one rank: compilations over 20 packings, of other values and numbers of documents."""
    torch.compiler.reset()
    compilations = 0

    def count(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        nonlocal compilations
        compilations += 1
        return graph.forward

    @partial(torch.compile, fullgraph=True, backend=count)
    def model(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return attend("varlen", q, k, v, cu, process_group=ranks)

    q, k, v, _ = inputs(dist.get_rank())
    total = TOKENS * len(ranks)
    error = 0.0
    for number in range(20):
        documents = 2 + number % 5
        cu = _bounds(number, documents, total)
        out = model(q, k, v, cu)
        eager = attend("varlen", q, k, v, cu, process_group=ranks)
        error = max(error, float((out - eager).abs().max()))
    return compilations, error


def _bounds(seed: int, documents: int, total: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randint(0, total + 1, (documents - 1,), generator=generator).sort().values
    return torch.cat([torch.zeros(1, dtype=torch.int64), inner, torch.tensor([total])])


def test_new_packings_compile_at_most_three_times(pool):
    """20 packings: the first, and at most two recompilations."""
    for compilations, error in pool.run(2, count_compilations, timeout=240):
        assert compilations <= 3
        assert error == 0.0


class Layer(nn.Module):
    """A residual attention layer."""

    def __init__(self, name: str, ranks: list[int], **options: Any) -> None:
        super().__init__()
        self.name, self.ranks, self.options = name, ranks, options
        self.qkv = nn.Linear(8, 24, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2)
        cu = torch.tensor([0, 3, TOKENS * len(self.ranks)])
        out = attend(self.name, q, k, v, cu, process_group=self.ranks, **self.options)
        return x + out.flatten(-2)


def save_attention(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The policy that docs/api.md recommends."""
    if op is torch.ops.nnscaler_ring.attention.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def train(ranks: list[int], name: str, mode: str) -> tuple[list[Tensor], int, int]:
    """Gradients of a model of two layers, and messages and bytes sent on the way."""
    torch.manual_seed(1)
    layers = [Layer(name, ranks, dropout_p=0.25) for _ in range(2)]
    x = inputs(dist.get_rank())[0].flatten(-2)
    context_fn = partial(create_selective_checkpoint_contexts, save_attention)
    before = nnscaler_ring.traffic(ranks)
    torch.manual_seed(2 + dist.get_rank())  # dropout: the seeds are agreed on
    for layer in layers:
        if mode == "selective":
            x = checkpoint(layer, x, use_reentrant=False, context_fn=context_fn)
        elif mode == "whole":
            x = checkpoint(layer, x, use_reentrant=False)
        else:
            x = layer(x)
    x.square().sum().backward()
    sent = nnscaler_ring.traffic(ranks) - before
    grads = [p.grad for layer in layers for p in layer.parameters()]
    return [x.detach(), *grads], sent.messages, sent.total_bytes


@pytest.mark.parametrize("name", NAMES)
def test_selective_checkpointing_repeats_no_communication(pool, name):
    plain = pool.run(2, train, name, "none")
    for mode in ("selective", "whole"):
        for (expected, messages, sent), (found, again, resent) in zip(
            plain, pool.run(2, train, name, mode), strict=True
        ):
            assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True)), mode
            if mode == "selective":
                assert (again, resent) == (messages, sent)
            else:
                assert again > messages and resent > sent  # so that the count above can tell


@pytest.mark.parametrize("name", NAMES)
def test_export_of_the_one_device_op(name):
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
            return attend(name, q, k, v, cu, softcap=2.0)

    q, k, v, _ = inputs(0)
    cu = torch.tensor([0, 3, TOKENS])
    exported = torch.export.export(Model(), (q, k, v, cu))
    assert torch.equal(exported.module()(q, k, v, cu), Model()(q, k, v, cu))
    names = [str(node.target) for node in exported.graph.nodes]
    assert "nnscaler_ring.attention.default" in names


@pytest.mark.parametrize("name", NAMES)
def test_meta_tensors_need_no_values(name):
    q, k, v = (x.to("meta").requires_grad_() for x in inputs(0)[:3])
    cu = torch.empty(3, dtype=torch.int64, device="meta")
    options = {"sinks": torch.empty(2, device="meta"), "dropout_p": 0.5}
    out = attend(name, q, k, v, cu, **options)
    assert out.shape == (1, TOKENS, 2, 4) and out.is_meta
    out.sum().backward()
    assert q.grad is not None and q.grad.shape == q.shape and q.grad.is_meta
