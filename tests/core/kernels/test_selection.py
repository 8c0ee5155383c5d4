"""Which kernel a call gets, and what it is told when there is none."""

import dataclasses

import pytest
import torch

from nnscaler_ring.core.kernels import (
    AUTO_KERNELS,
    KERNELS,
    Problem,
    kernel_refusals,
    select_kernel,
)

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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("deterministic", [False, True])
def test_auto_takes_the_fused_kernel_on_cpu(dtype, deterministic):
    problem = changed(dtype=dtype, deterministic=deterministic)
    assert select_kernel("auto", problem).name == "torch_cpu"


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
