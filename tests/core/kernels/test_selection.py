"""Which kernel a call gets, and what it is told when there is none."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nnscaler_ring.core.kernels import (
    AUTO_KERNELS,
    KERNELS,
    Problem,
    cpu_tiles,
    kernel_refusals,
    select_kernel,
)
from nnscaler_ring.core.kernels.native.library import Library

PROBLEM = Problem(
    device_type="cpu",
    dtype=torch.float32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    v_head_dim=64,
)


def changed(**fields):
    return dataclasses.replace(PROBLEM, **fields)


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_found_by_its_name(name):
    if kernel_refusals(PROBLEM)[name] is None:
        assert select_kernel(name, PROBLEM).name == name


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["compiled", "not compiled"])
def is_compiled(request, monkeypatch) -> bool:
    """As if the C++ kernel were there, or not; nothing is computed."""
    functions = SimpleNamespace(nnscaler_ring_attention=None)
    found = {"compiled": Library(functions, "avx2", Path()), "not compiled": "it is not compiled"}
    monkeypatch.setattr(cpu_tiles, "library", lambda: found[request.param])
    return request.param == "compiled"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_auto_takes_the_compiled_kernel_on_cpu_else_the_fused_one(
    dtype, deterministic, is_compiled, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    problem = changed(dtype=dtype, deterministic=deterministic)
    by_tiles = is_compiled and dtype != torch.float64
    assert select_kernel("auto", problem).name == ("cpu_tiles" if by_tiles else "torch_cpu")


def test_the_compiled_kernel_says_what_it_lacks(is_compiled):
    assert "not in torch.float64" in kernel_refusals(changed(dtype=torch.float64))["cpu_tiles"]
    assert "on meta" in kernel_refusals(changed(device_type="meta"))["cpu_tiles"]
    reason = kernel_refusals(PROBLEM)["cpu_tiles"]
    assert reason is None if is_compiled else reason == "it is not compiled"


def test_auto_leaves_plain_bfloat16_to_torch_where_there_is_amx(is_compiled, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert select_kernel("auto", changed(dtype=torch.bfloat16)).name == "torch_cpu"
    for problem in (changed(), changed(dtype=torch.bfloat16, dropout=True)):
        assert select_kernel("auto", problem).name == ("cpu_tiles" if is_compiled else "torch_cpu")


def test_auto_leaves_plain_calls_to_torch_on_the_baseline_instruction_set(monkeypatch):
    functions = SimpleNamespace(nnscaler_ring_attention=None)
    monkeypatch.setattr(cpu_tiles, "library", lambda: Library(functions, "baseline", Path()))
    assert select_kernel("auto", PROBLEM).name == "torch_cpu"
    assert select_kernel("auto", changed(alibi=True)).name == "cpu_tiles"


def test_auto_never_picks_the_reference():
    assert "reference" not in AUTO_KERNELS and set(AUTO_KERNELS) <= set(KERNELS)


def test_a_refusal_names_the_kernel_its_reason_and_a_way_out():
    with pytest.raises(
        ValueError,
        match=r"kernel='torch_cpu' cannot compute this call \(torch_cpu: it computes on cpu, "
        r"the tensors are on meta\); kernel='reference' computes anything",
    ):
        select_kernel("torch_cpu", changed(device_type="meta"))
    with pytest.raises(ValueError, match=r"not in torch\.float8_e5m2"):
        select_kernel("torch_cpu", changed(dtype=torch.float8_e5m2))


def test_auto_that_finds_none_lists_every_reason():
    with pytest.raises(ValueError, match="kernel='auto' cannot compute this call") as refusal:
        select_kernel("auto", changed(device_type="meta"))
    for name in AUTO_KERNELS:
        assert f"{name}: " in str(refusal.value)


def test_refusals_of_all_kernels():
    assert set(kernel_refusals(PROBLEM)) == set(KERNELS)
    assert kernel_refusals(PROBLEM)["torch_cpu"] is None
    assert kernel_refusals(PROBLEM)["reference"] is None
    assert "meta" in kernel_refusals(changed(device_type="meta"))["torch_cpu"]


def test_the_reference_refuses_what_it_cannot_repeat():
    assert select_kernel("reference", changed(device_type="cuda")).name == "reference"
    with pytest.raises(ValueError, match="no bitwise repeatability"):
        select_kernel("reference", changed(device_type="cuda", deterministic=True))


def test_an_unknown_name_lists_the_kernels():
    with pytest.raises(ValueError, match="kernel must be 'auto' or one of .*torch_cpu.*got 'fast'"):
        select_kernel("fast", PROBLEM)
