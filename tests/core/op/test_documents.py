"""cu_seqlens as a value: read right, and from a device at most once per tensor and version."""

import gc
from typing import Any

import pytest
import torch

from nnscaler_ring import wrap_ring_attn_varlen_func
from nnscaler_ring.core.op import documents
from nnscaler_ring.core.op.documents import cu_seqlens_of, documents_of, total_of
from tests.core.attempts import arguments


class OnDevice(torch.Tensor):
    """A CPU tensor that says it is on a GPU, and counts how often its values are read."""

    copies = 0

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")

    def tolist(self) -> list[Any]:
        OnDevice.copies += 1
        return super().tolist()


@pytest.fixture
def on_device(monkeypatch):
    """Makes such tensors; the count starts at 0."""
    monkeypatch.setattr(OnDevice, "copies", 0)
    return lambda values: torch.tensor(values).as_subclass(OnDevice)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "values", [[0, 3, 3, 7], [0, 0], [0, 2**31 - 1], [5, -1, 1 << 30]], ids=str
)
def test_values_go_in_and_come_out(values, dtype):
    read = documents_of(torch.tensor(values, dtype=dtype))
    assert cu_seqlens_of(read) == tuple(values)
    assert total_of(read) == values[-1]


def test_equal_values_are_equal_whatever_holds_them():
    values = torch.tensor([0, 3, 9])
    strided = torch.tensor([0, 1, 3, 1, 9])[::2]
    negated = torch._neg_view(-values)
    with torch.inference_mode():
        inference = torch.tensor([0, 3, 9], dtype=torch.int32)
    for same in (values.int(), strided, negated, inference, torch.nn.Parameter(values, False)):
        assert documents_of(same) == documents_of(values)
    assert documents_of(values + 1) != documents_of(values)
    assert cu_seqlens_of(documents_of(torch.tensor([0, 1 << 40]))) == (0, 1 << 40)


def test_a_tensor_on_a_device_is_copied_once(on_device):
    first, second = on_device([0, 3, 9]), on_device([0, 4, 9])
    for _ in range(3):
        assert cu_seqlens_of(documents_of(first)) == (0, 3, 9)
        assert cu_seqlens_of(documents_of(second)) == (0, 4, 9)
    assert OnDevice.copies == 2


@pytest.mark.parametrize("through", ["the tensor", "a view"])
def test_a_tensor_on_a_device_that_changed_is_copied_again(on_device, through):
    cu_seqlens = on_device([0, 3, 9])
    documents_of(cu_seqlens)
    changed = cu_seqlens if through == "the tensor" else cu_seqlens[1:]
    changed += 1
    for _ in range(3):
        assert cu_seqlens_of(documents_of(cu_seqlens))[1:] == (4, 10)
    assert OnDevice.copies == 2


def test_inference_tensors_have_no_version_and_are_read_every_time(on_device):
    with torch.inference_mode():
        cu_seqlens = on_device([0, 3, 9])
        assert cu_seqlens_of(documents_of(cu_seqlens)) == (0, 3, 9)
        cu_seqlens += 1
        assert cu_seqlens_of(documents_of(cu_seqlens)) == (1, 4, 10)
    assert OnDevice.copies == 2


def test_nothing_is_remembered_of_cpu_tensors_and_of_dead_ones(on_device):
    cpu, cu_seqlens = torch.tensor([0, 3, 9]), on_device([0, 3, 9])
    gc.collect()
    before = len(documents._COPIED)
    documents_of(cpu)
    assert len(documents._COPIED) == before
    documents_of(cu_seqlens)
    assert len(documents._COPIED) == before + 1
    del cu_seqlens
    gc.collect()
    assert len(documents._COPIED) == before


@pytest.mark.cuda
def test_a_model_waits_for_the_gpu_once_per_new_cu_seqlens():
    cu_seqlens = torch.tensor([0, 3, 9], device="cuda")
    torch.cuda.synchronize()
    documents_of(cu_seqlens)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert cu_seqlens_of(documents_of(cu_seqlens)) == (0, 3, 9)
        with pytest.raises(RuntimeError, match="synchroniz"):
            documents_of(cu_seqlens + 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("inference", [False, True])
def test_the_op_takes_every_kind_of_cu_seqlens(inference):
    good = arguments(wrap_ring_attn_varlen_func)
    expected = wrap_ring_attn_varlen_func(**good)
    with torch.inference_mode(inference):
        for kind in (torch.Tensor.clone, torch.Tensor.int, torch.Tensor.long):
            names = ("cu_seqlens_q", "cu_seqlens_k")
            same = good | {name: kind(good[name]) for name in names}
            assert torch.equal(wrap_ring_attn_varlen_func(**same), expected)
