"""Tensors that the ops do not take are refused in words; suspicious ones are told once."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from nnscaler_ring import (
    DropoutSeed,
    HeadOffsets,
    wrap_dilated_attn_func,
    wrap_ring_attn_func,
    wrap_ring_attn_varlen_func,
    wrap_zigzag_attn_func,
)
from nnscaler_ring.core.op.taken_tensors import warn_of_heads_first
from nnscaler_ring.models import RingAttention
from tests.oracle import make_qkv

DENSE = {
    "ring": wrap_ring_attn_func,
    "zigzag": wrap_zigzag_attn_func,
    "dilated": lambda q, k, v: wrap_dilated_attn_func(q, k, v, [4, 8], [1, 2]),
}


def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    cu = torch.tensor([0, q.shape[0]])
    return wrap_ring_attn_varlen_func(q, k, v, cu, cu)


@pytest.mark.parametrize("op", DENSE.values(), ids=DENSE)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_forward_mode_is_refused(op, at):
    tensors = list(make_qkv(0, 1, 8, 8, 2, 2, 4))
    name = "qkv"[at]
    with forward_ad.dual_level():
        tensors[at] = forward_ad.make_dual(tensors[at], torch.ones_like(tensors[at]))
        with pytest.raises(NotImplementedError, match=f"{name} must not carry a forward-mode tang"):
            op(*tensors)
        tensors[at] = forward_ad.unpack_dual(tensors[at]).primal
        assert op(*tensors).isfinite().all()  # a level is open, but nothing is differentiated


@pytest.mark.parametrize("transform", ["jvp", "grad", "vjp", "jacrev", "jacfwd", "hessian"])
def test_transforms_of_torch_func_are_refused(transform):
    q, k, v = make_qkv(0, 1, 3, 3, 2, 2, 4)

    def loss(x: Tensor) -> Tensor:
        return wrap_ring_attn_func(x, k, v).sum()

    with pytest.raises(NotImplementedError, match="use reverse mode, torch.autograd.grad"):
        match transform:
            case "jvp":
                torch.func.jvp(loss, (q,), (q,))
            case "vjp":
                torch.func.vjp(loss, q)
            case name:
                getattr(torch.func, name)(loss)(q)


def test_a_tangent_of_bias_is_refused():
    q, k, v = make_qkv(0, 1, 3, 3, 2, 2, 4)
    bias = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="bias must not carry"):
        wrap_ring_attn_func(q, k, v, bias=forward_ad.make_dual(bias, bias))


def test_vmap_is_a_loop():
    q, k, v = (torch.stack([x, 2 * x]) for x in make_qkv(0, 1, 3, 3, 2, 2, 4))
    found = torch.vmap(wrap_ring_attn_func)(q, k, v)
    assert torch.equal(found[1], wrap_ring_attn_func(q[1], k[1], v[1]))


def test_nested_tensors_are_refused():
    q, _, _ = make_qkv(0, None, 8, 8, 2, 2, 4)
    nested = torch.nested.nested_tensor_from_jagged(q, torch.tensor([0, 3, 8]))
    for op in (*DENSE.values(), packed):
        with pytest.raises(TypeError, match=r"q must be a plain tensor, got a nested one; give"):
            op(nested, nested, nested)


def refuse_dtensor(ranks: list[int]) -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh("cpu", ranks)
    q = DTensor.from_local(torch.randn(1, 4, 2, 4), mesh, [Shard(1)])
    with pytest.raises(TypeError, match=r"q must be this rank's plain tensor, got a DTensor"):
        wrap_ring_attn_func(q, q, q, process_group=ranks)


def test_dtensors_are_refused(pool):
    pool.run(2, refuse_dtensor)


def test_the_fake_backend_is_refused():
    program = (
        "import torch, torch.distributed as dist\n"
        "from torch.testing._internal.distributed.fake_pg import FakeStore\n"
        "from nnscaler_ring import wrap_ring_attn_func\n"
        "dist.init_process_group('fake', rank=0, world_size=2, store=FakeStore())\n"
        "x = torch.randn(1, 4, 2, 4)\n"
        "for group in ([0, 1], dist.group.WORLD):\n"
        "    try:\n"
        "        wrap_ring_attn_func(x, x, x, process_group=group)\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], text=True, capture_output=True, timeout=120, check=False
    )
    told = done.stdout.splitlines()
    assert done.returncode == 0 and len(told) == 2, done.stderr
    assert all("a backend that moves data, such as gloo or nccl, got 'fake'" in x for x in told)


SUSPECTED = [((1, 8, 4096, 64), "dim 1 as 8 tokens and dim 2 as 4096 heads"), ((4, 600, 8), "dim")]


@pytest.mark.parametrize(("shape", "message"), SUSPECTED)
def test_heads_first_is_suspected_once(shape, message):
    q = torch.empty(shape, device="meta")
    with pytest.warns(UserWarning, match=message):
        warn_of_heads_first(q)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_heads_first(q)


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 128, 64), (2, 1, 512, 8), (1, 0, 64, 64), (1, 600, 600, 8), (4096, 128, 64)],
    ids=str,
)
def test_shapes_of_models_are_not_suspected(shape):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_heads_first(torch.empty(shape, device="meta"))


def test_the_ops_look_for_heads_that_come_first():
    q = torch.zeros(1, 2, 700, 1)
    with pytest.warns(UserWarning, match=r"give q.transpose\(1, 2\), k and v likewise"):
        wrap_ring_attn_func(q, q, q)


INT = np.int64


def test_integers_of_numpy_are_integers():
    q, k, v = make_qkv(1, 1, 8, 8, 2, 2, 4)
    cases = [
        (wrap_ring_attn_func, {"window_size": (INT(3), INT(-1))}, {"window_size": (3, -1)}),
        (wrap_ring_attn_func, {"shard_lens": [INT(8)]}, {"shard_lens": [8]}),
        (wrap_zigzag_attn_func, {"shard_lens": [np.int32(8)]}, {}),
        (
            wrap_ring_attn_func,
            {"dropout_p": 0.5, "dropout_seed": INT(7)},
            {"dropout_p": 0.5, "dropout_seed": 7},
        ),
        (
            wrap_ring_attn_func,
            {"dropout_p": 0.5, "dropout_seed": DropoutSeed(INT(7), INT(1), np.uint8(2))},
            {"dropout_p": 0.5, "dropout_seed": DropoutSeed(7, 1, 2)},
        ),
        (
            wrap_dilated_attn_func,
            {"segment_lengths": [INT(4)], "dilation_rates": [INT(2)]},
            {"segment_lengths": [4], "dilation_rates": [2]},
        ),
        (
            wrap_dilated_attn_func,
            {
                "segment_lengths": [4],
                "dilation_rates": [2],
                "head_offsets": HeadOffsets("mod", INT(1), INT(4)),
            },
            {
                "segment_lengths": [4],
                "dilation_rates": [2],
                "head_offsets": HeadOffsets("mod", 1, 4),
            },
        ),
    ]
    for op, given, plain in cases:
        assert torch.equal(op(q, k, v, **given), op(q, k, v, **plain))
    for wrong in (np.bool_(True), np.float64(2)):
        with pytest.raises(TypeError, match="window_size must be two ints"):
            wrap_ring_attn_func(q, k, v, window_size=(wrong, 0))


def ring_without_a_group(ranks: list[int]) -> None:
    size = torch.distributed.get_world_size()
    with pytest.warns(UserWarning, match=f"ring_size={size} without process_group"):
        RingAttention(8, 2, ring_size=size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RingAttention(8, 2, ring_size=size + 1)
        RingAttention(8, 2)
        RingAttention(8, 2, ring_size=len(ranks), process_group=ranks)


def test_a_ring_without_a_group_on_as_many_ranks_is_suspected(pool):
    pool.run(2, ring_without_a_group)


def test_a_ring_on_one_device_is_not_suspected():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RingAttention(8, 2, ring_size=2)
