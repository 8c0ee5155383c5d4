"""flash-attn 3 and 4 mounted in torch, with a torch that only pretends to mount them."""

import importlib.metadata
from dataclasses import replace

import pytest
import torch
from torch.nn import attention

from nnscaler_ring.core.kernels import Problem, aten_flash, flash_attn, torch_mounted
from nnscaler_ring.core.kernels.torch_mounted import MOUNTED
from tests.core.kernels.flash_attn_versions import VERSIONS, Recorder
from tests.core.kernels.stand_ins import Aten
from tests.core.kernels.test_reference import Shape, check_tile, inputs, one_thread  # noqa: F401

HOPPER = Problem("cuda", torch.bfloat16, 4, 2, 64, 64, compute_capability=(9, 0))


@pytest.fixture
def mounted(monkeypatch):
    """What was mounted, in order; both packages are there."""
    mounted = []
    functions = {
        "list_flash_attention_impls": lambda: ["FA3", "FA4"],
        "current_flash_attention_impl": lambda: mounted[-1] if mounted else None,
        "activate_flash_attention_impl": mounted.append,
    }
    for name, function in functions.items():
        monkeypatch.setattr(attention, name, function, raising=False)  # new in torch 2.11
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.0.0b18")
    packages = {
        "flash_attn_3": Recorder(VERSIONS["3 of main"]).functions,
        "flash_attn_4": Recorder(VERSIONS["4.0.0b14"]).functions,
    }
    for name, offer in list(MOUNTED.items()):
        package = replace(offer.package, load=lambda name=offer.package.name: packages[name])
        monkeypatch.setitem(MOUNTED, name, replace(offer, package=package))
    return mounted


@pytest.mark.parametrize(("name", "implementation"), [("torch_fa3", "FA3"), ("torch_fa4", "FA4")])
def test_it_is_mounted_when_chosen_and_once(mounted, monkeypatch, name, implementation):
    stand_in = Aten()
    monkeypatch.setattr(aten_flash, "aten", stand_in)
    assert MOUNTED[name].supports(HOPPER) is None and mounted == []
    for _ in range(2):
        kernel = MOUNTED[name].prepared(HOPPER)
        assert kernel.name == name and mounted == [implementation]
    shape = Shape(6, 9, (4, 0))
    check_tile(kernel, shape, *inputs(shape))
    assert stand_in.calls == ["_flash_attention_forward", "_flash_attention_backward"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"softcap": True}, "no softcap"),
        ({"deterministic": True, "head_dim": 256}, "no deterministic backward"),
        ({"compute_capability": (8, 0)}, "the device has 8.0"),
        ({"dtype": torch.float32}, "not in torch.float32"),
    ],
    ids=str,
)
def test_what_is_refused(mounted, changes, reason):
    refusal = MOUNTED["torch_fa3"].supports(replace(HOPPER, **changes))
    assert refusal is not None and reason in refusal


def test_a_package_that_is_not_there_is_named():
    flash_attn.installed.cache_clear()
    refusal = MOUNTED["torch_fa3"].supports(HOPPER)
    assert refusal is not None and "is not installed" in refusal


def test_a_torch_that_does_not_offer_it(mounted, monkeypatch):
    monkeypatch.setattr(attention, "list_flash_attention_impls", lambda: ["FA4"])
    refusal = MOUNTED["torch_fa3"].supports(HOPPER)
    assert refusal is not None and "offers to mount ['FA4']" in refusal


@pytest.mark.parametrize(("version", "works"), [("4.0.0b18", True), ("4.0.0b20", False)])
def test_results_that_torch_would_misread(mounted, monkeypatch, version, works):
    monkeypatch.setattr(torch_mounted.torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert (MOUNTED["torch_fa4"].supports(HOPPER) is None) == works
    monkeypatch.setattr(torch_mounted.torch, "__version__", "2.14.0")
    assert MOUNTED["torch_fa4"].supports(HOPPER) is None


def test_a_torch_that_fails_to_mount_it_says_what_to_do(mounted, monkeypatch):
    def fail(implementation):
        raise RuntimeError("no kernels")

    monkeypatch.setattr(attention, "activate_flash_attention_impl", fail)
    with pytest.raises(ValueError, match=r"kernel='torch_fa3': torch .* could not mount FA3 "):
        MOUNTED["torch_fa3"].prepared(HOPPER)
