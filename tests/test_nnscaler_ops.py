"""The parts of the nnScaler integration that need no nnScaler: decisions about plain data."""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from nnscaler_ring import DropoutSeed, nnscaler_ops
from nnscaler_ring.nnscaler_ops import OPS, annotate, find_blocks, group_of_device
from nnscaler_ring.nnscaler_samples import SampledQuery
from tests.oracle import Mods, dense_attention

RING, ZIGZAG, VARLEN, DILATED = OPS[:4]


@pytest.mark.parametrize(
    ("op", "heads", "return_lse", "annotation"),
    [
        (RING, (4, 4), False, "b l h d^, b l h d^, b l h e^ -> b l h e^"),
        (RING, (6, 2), False, "b l (g 3) d^, b l g d^, b l g e^ -> b l (g 3) e^"),
        (ZIGZAG, (4, 1), False, "b l h d^, b l 1 d^, b l 1 e^ -> b l h e^"),
        (DILATED, (6, 2), False, "b l (g 3) d^, b l g d^, b l g e^ -> b l (g 3) e^"),
        (RING, (6, 2), True, "b l (g 3) d^, b l g d^, b l g e^ -> b l (g 3) e^, b (g 3) l"),
        (VARLEN, (4, 4), False, "l h d^, l h d^, l h e^, n^, n^ -> l h e^"),
        (VARLEN, (8, 4), True, "l (g 2) d^, l g d^, l g e^, n^, n^ -> l (g 2) e^, (g 2) l"),
    ],
)
def test_annotation(
    op: nnscaler_ops.Op, heads: tuple[int, int], return_lse: bool, annotation: str
) -> None:
    batch = () if op.packed else (2,)
    shapes = [(*batch, 12, heads[0], 8), (*batch, 12, heads[1], 8), (*batch, 12, heads[1], 6)]
    named = dict(zip(op.tensors, [*shapes, (4,), (4,)], strict=False))
    assert annotate(op, named, return_lse=return_lse) == annotation


@pytest.mark.parametrize(
    ("op", "heads", "optional", "annotation"),
    [
        (RING, (4, 4), {"sinks": (4,)}, "b l h d^, b l h d^, b l h e^, h -> b l h e^"),
        (
            RING,
            (6, 2),
            {"alibi_slopes": (2, 6), "bias": (2, 6, 12, 12), "sinks": (6,)},
            "b l (g 3) d^, b l g d^, b l g e^, b (g 3), b (g 3) l k^, (g 3) -> b l (g 3) e^",
        ),
        (
            ZIGZAG,
            (4, 1),
            {"alibi_slopes": (4,), "bias": (1, 1, 12, 12)},
            "b l h d^, b l 1 d^, b l 1 e^, h, 1 1 l k^ -> b l h e^",
        ),
        (
            VARLEN,
            (4, 4),
            {"bias": (4, 12, 12)},
            "l h d^, l h d^, l h e^, n^, n^, h l k^ -> l h e^",
        ),
        (VARLEN, (4, 4), {"bias": (1, 12, 12)}, "l h d^, l h d^, l h e^, n^, n^, 1 l k^ -> l h e^"),
    ],
)
def test_annotation_of_optional_tensors(op, heads, optional, annotation) -> None:
    batch = () if op.packed else (2,)
    shapes = [(*batch, 12, heads[0], 8), (*batch, 12, heads[1], 8), (*batch, 12, heads[1], 6)]
    named = dict(zip(op.tensors, [*shapes, (4,), (4,)], strict=False))
    assert annotate(op, {**named, **optional}, return_lse=False) == annotation


def test_annotation_refuses() -> None:
    def annotate(op: nnscaler_ops.Op, shapes: list, *, return_lse: bool) -> str:
        named = dict(zip(("q", "k", "v"), shapes, strict=True))
        return nnscaler_ops.annotate(op, named, return_lse=return_lse)

    with pytest.raises(ValueError, match="k must have q's tokens, \\[12\\], got \\[10\\]"):
        annotate(VARLEN, [(12, 4, 8), (10, 4, 8), (10, 4, 8)], return_lse=False)
    with pytest.raises(ValueError, match="k must have q's batch and tokens"):
        annotate(RING, [(1, 12, 4, 8), (1, 10, 4, 8), (1, 10, 4, 8)], return_lse=False)
    with pytest.raises(ValueError, match="multiple of num_kv_heads, got 4 and 3"):
        annotate(RING, [(1, 12, 4, 8), (1, 12, 3, 8), (1, 12, 3, 8)], return_lse=False)
    with pytest.raises(ValueError, match="q must have 4 dimensions"):
        annotate(RING, [(12, 4, 8)] * 3, return_lse=False)


def part(tokens: tuple[int, int], heads: tuple[int, int], *devices: int) -> tuple:
    return ((0, 2), tokens, heads, (0, 8)), devices


HEADS_BY_SEQUENCE = [
    part((0, 6), (0, 2), 0),
    part((6, 12), (0, 2), 1),
    part((0, 6), (2, 4), 2),
    part((6, 12), (2, 4), 3),
]


def groups(parts: list) -> dict[int, tuple[int, ...]]:
    """What every device's call gets."""
    found = {}
    for ranges, devices in parts:
        blocks = find_blocks("op", ranges, parts, token_dim=1, total=12)
        for device in devices:
            found[device] = group_of_device("op", blocks, device)
    return found


def test_heads_by_sequence() -> None:
    assert groups(HEADS_BY_SEQUENCE) == {0: (0, 1), 1: (0, 1), 2: (2, 3), 3: (2, 3)}


def test_strided() -> None:
    parts = [(ranges, (n * 2 % 3,)) for n, (ranges, _) in enumerate(HEADS_BY_SEQUENCE)]
    parts[3] = (parts[3][0], (3,))
    assert groups(parts) == {0: (0, 2), 2: (0, 2), 1: (1, 3), 3: (1, 3)}


def test_replicas() -> None:
    parts = [part((0, 6), (0, 4), 0), part((6, 12), (0, 4), 2)]
    parts += [part((0, 6), (0, 4), 1), part((6, 12), (0, 4), 3)]
    assert groups(parts) == {0: (0, 2), 2: (0, 2), 1: (1, 3), 3: (1, 3)}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([part((0, 6), (0, 4), 0)], "hold every token of 12 once per group, got tokens 0 to 6"),
        ([part((0, 6), (0, 4), 0), part((4, 12), (0, 4), 1)], "every token of 12 once"),
        ([part((0, 4), (0, 4), 0), part((4, 12), (0, 4), 1)], "must have equal blocks"),
        (
            [part((0, 6), (0, 4), 0, 1), part((6, 12), (0, 4), 2)],
            "every block as many times as the others",
        ),
        ([part((0, 6), (0, 4), 0), part((6, 12), (0, 4), 0)], "device two blocks"),
        ([part((0, 6), (0, 4), 1), part((6, 12), (0, 4), 0)], "devices with higher numbers"),
    ],
)
def test_refused_plans(parts: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_blocks("op", parts[0][0], parts, token_dim=1, total=12)


def test_mixed_sums_are_refused() -> None:
    """One KV head: devices 0 and 2 share tokens 0 to 6 of k, and 1 and 3 the others."""
    outer_heads = [part((0, 6), (0, 1), 0, 2), part((6, 12), (0, 1), 1, 3)]
    with pytest.raises(ValueError, match="dimensions that k has first"):
        nnscaler_ops.refuse_mixed_sums("op", "k", outer_heads)
    inner_heads = [part((0, 6), (0, 1), 0, 1), part((6, 12), (0, 1), 2, 3)]
    nnscaler_ops.refuse_mixed_sums("op", "k", inner_heads)


def test_refused_arguments() -> None:
    def refuse(**arguments: object) -> None:
        nnscaler_ops.refuse_arguments(RING, arguments)

    refuse(process_group=None, shard_lens=None, bias=None, causal=False, dropout_seed=3)
    with pytest.raises(ValueError, match="dropout_seed must be an int or None under nnScaler"):
        refuse(dropout_seed=DropoutSeed(3, first_head=2))
    with pytest.raises(ValueError, match="process_group must be None under nnScaler"):
        refuse(process_group=[0, 1])
    with pytest.raises(ValueError, match="shard_lens must be None under nnScaler"):
        refuse(shard_lens=[3, 4])


class Part(NamedTuple):
    """What a sub-call of nnScaler says of its devices."""

    device: tuple[int, ...]


def test_replicated_dropout_is_refused() -> None:
    refuse = nnscaler_ops.refuse_replicated_dropout
    refuse(RING, {}, [Part((0,))])
    refuse(RING, {"dropout_seed": 3}, [Part((0,)), Part((1,))])
    with pytest.raises(ValueError, match=r"dropout_seed must be given where .* devices \[0, 1\]"):
        refuse(RING, {}, [Part((0,)), Part((1,))])


def test_tensors_come_first() -> None:
    x = torch.zeros(2)
    arguments = {"q": x, "sinks": x, "causal": True, "k": x, "bias": None, "v": x}
    tensors = nnscaler_ops.split_tensors(RING, arguments, lambda y: isinstance(y, torch.Tensor))
    assert list(tensors) == ["q", "k", "v", "sinks"]
    assert arguments == {"causal": True, "bias": None}
    with pytest.raises(ValueError, match="softcap must not be a tensor under nnScaler"):
        arguments = {"q": x, "k": x, "v": x, "softcap": x}
        nnscaler_ops.split_tensors(RING, arguments, lambda y: isinstance(y, torch.Tensor))


@pytest.mark.parametrize("return_lse", [False, True])
def test_trace_computes_nothing(return_lse: bool) -> None:
    """A sequence whose scores would take terabytes gives shapes, dtypes and gradients at once."""
    q = torch.zeros(1, 2**20, 2, 1, dtype=torch.bfloat16, requires_grad=True)
    k = torch.zeros(1, 2**20, 1, 1, dtype=torch.bfloat16)
    result = nnscaler_ops.trace(RING, q, k, v=k.expand(-1, -1, -1, 2), return_lse=return_lse)
    out, *lse = result if return_lse else (result,)
    assert (out.shape, out.dtype, out.requires_grad) == ((1, 2**20, 2, 2), torch.bfloat16, True)
    assert [(x.shape, x.dtype) for x in lse] == [((1, 2, 2**20), torch.float32)] * return_lse


def test_trace_checks_arguments() -> None:
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match="window_size entries must be -1 or >= 0"):
        nnscaler_ops.trace(RING, q, q, q, window_size=(-3, 0))
    with pytest.raises(ValueError, match="bias must be .* for q"):
        nnscaler_ops.trace(RING, q, q, q, bias=q)
    with pytest.raises(TypeError, match="wrap_ring_attn_func: .*'casual'"):
        nnscaler_ops.trace(RING, q, q, q, casual=True)


STUB = """
class CustomizedOps:
    known = {}
    exist = staticmethod(lambda signature: signature in CustomizedOps.known)
    @staticmethod
    def register(signature, op_create_fn, code, runtime_fn, *, emit_fn=None, input_gen_fn=None):
        assert signature not in CustomizedOps.known
        CustomizedOps.known[signature] = runtime_fn
"""


@pytest.mark.parametrize(
    "imports", ["nnscaler_ring, nnscaler", "nnscaler, nnscaler_ring", "nnscaler_ring"]
)
def test_registers_in_either_order(tmp_path: Path, imports: str) -> None:
    """With a stand-in for nnScaler, so that the order is tested where nnScaler is missing."""
    package = tmp_path / "nnscaler" / "graph" / "parser"
    package.mkdir(parents=True)
    (package / "register.py").write_text(STUB)
    (tmp_path / "nnscaler" / "__init__.py").write_text("import nnscaler.graph.parser.register")
    script = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import {imports}
registry = sys.modules.get("nnscaler.graph.parser.register")
print(*sorted(registry.CustomizedOps.known) if registry else ["nnscaler not imported"], sep="\\n")
"""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script], capture_output=True, text=True
    )
    assert done.stderr == ""
    expected = sorted(op.signature for op in OPS) if "nnscaler" in imports.split(", ") else None
    assert done.stdout.split("\n")[:-1] == (expected or ["nnscaler not imported"])


@pytest.mark.parametrize("optional", [(), ("alibi_slopes", "sinks"), ("bias", "sinks")])
def test_one_block_stands_for_all_keys(optional: tuple[str, ...]) -> None:
    """The profiler's sample attends to as many keys as a rank's queries read, forth and back."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 6, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    shapes = {"alibi_slopes": (4,), "bias": (2, 4, 6, 15), "sinks": (4,)}
    extras = {name: torch.randn(shapes[name], dtype=torch.float64) for name in optional}
    wanted = [k.requires_grad_()]
    wanted += [x.requires_grad_() for name, x in extras.items() if name != "alibi_slopes"]
    sample = SampledQuery.of(q, 15, extras).requires_grad_().clone()
    out, lse = RING.function(sample, k, v, return_lse=True)
    long_k, long_v = (x.repeat(1, 3, 1, 1)[:, :15] for x in (k, v))
    for row in range(2):
        bounds = {"cu_seqlens_q": [0, 6], "cu_seqlens_k": [0, 15]}
        bias = extras["bias"][row : row + 1] if "bias" in extras else None
        mods = Mods(alibi_slopes=extras.get("alibi_slopes"), bias=bias, sinks=extras.get("sinks"))
        dense = dense_attention(q[row], long_k[row], long_v[row], causal=True, mods=mods, **bounds)
        torch.testing.assert_close((out[row], lse[row]), dense)
    assert out.shape == (2, 6, 4, 8)
    gradients = torch.autograd.grad(out.sum(), wanted)
    assert [x.shape for x in gradients] == [x.shape for x in wanted]
