"""nnscaler_on_cpu: entered explicitly, undone on exit, refused where CUDA is available."""

import pytest
import torch

from nnscaler_ring import cpu_runtime
from tests.ranks import RankPool


def enter_and_leave(ranks: list[int]) -> dict[str, list[str]]:
    """What stands in torch.cuda before, inside, and after an error inside."""

    def now() -> list[str]:
        return [
            f"{name}: {getattr(owner, name).__module__}"
            for owner, name, _ in cpu_runtime.SUBSTITUTIONS
            if hasattr(getattr(owner, name), "__module__")
        ]

    found = {"before": now()}
    try:
        with cpu_runtime.nnscaler_on_cpu():
            found["inside"] = now()
            assert torch.cuda.current_device() == torch.device("cpu")
            assert torch.ones(2).cuda().device.type == "cpu"
            assert torch.nn.Linear(1, 1).cuda().weight.device.type == "cpu"
            raise KeyError("a user's error")
    except KeyError:
        found["after"] = now()
    return found


def test_undone_on_exit(two_ranks: RankPool) -> None:
    for found in two_ranks.run(2, enter_and_leave):
        assert found["before"] == found["after"]
        assert len(found["inside"]) == len(cpu_runtime.SUBSTITUTIONS)
        assert all(line.endswith(": nnscaler_ring.cpu_runtime") for line in found["inside"])


def test_refused_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with (
        pytest.raises(RuntimeError, match="CUDA_VISIBLE_DEVICES=''"),
        cpu_runtime.nnscaler_on_cpu(),
    ):
        pass
