"""nnscaler_on_cpu: entered explicitly, undone on exit, refused where CUDA is available."""

import pytest
import torch

from nnscaler_ring import cpu_runtime
from nnscaler_ring.policies import shard_sequence
from tests.nnscaler.models import TOKENS, Autocast
from tests.nnscaler.runtime import nnscaler_ranks, parallelize
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


def autocast(ranks: list[int]) -> tuple[torch.Tensor, str]:
    torch.manual_seed(0)
    model, x = Autocast("cuda"), torch.randn(2, TOKENS, 16)
    with nnscaler_ranks() as nnscaler:
        # nnScaler's own default, which traces on a GPU.
        parallel, code = parallelize(
            nnscaler, model, {"x": x}, shard_sequence, 2, trace_strategy="cuda_run_cpu_offload"
        )
        found = parallel(x)
    assert torch.autocast.__module__ != cpu_runtime.__name__ and not torch.is_autocast_enabled()
    return found.detach(), code


def test_autocast_is_that_of_the_cpu(two_ranks: RankPool) -> None:
    """nnScaler generates autocast of CUDA, which does nothing, and says so, where there is none."""
    torch.manual_seed(0)
    model, x = Autocast("cpu"), torch.randn(2, TOKENS, 16)
    expected = model(x)
    with torch.autocast("cpu", enabled=False):
        assert not torch.equal(expected, Autocast("cuda")(x))
    for found, code in two_ranks.run(2, autocast, timeout=60):
        assert "torch.autocast(device_type='cuda', dtype=torch.bfloat16, enabled=True" in code
        assert "process_group=(0, 1)" in code
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)
        assert (found / 2).bfloat16().float().equal(found / 2)


def asynchronous(ranks: list[int]) -> str:
    with nnscaler_ranks() as nnscaler:
        try:
            parallelize(
                nnscaler,
                Autocast("cpu"),
                {"x": torch.randn(2, TOKENS, 16)},
                shard_sequence,
                2,
                use_async_comm=True,
            )
        except RuntimeError as error:
            return str(error.__cause__)
    return "nothing"


def test_asynchronous_messages_are_refused(two_ranks: RankPool) -> None:
    """Two pipeline stages of two ranks each waited for each other for ever."""
    assert "use_async_comm must be False inside" in two_ranks.run(2, asynchronous, timeout=30)[0]


def test_refused_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with (
        pytest.raises(RuntimeError, match="CUDA_VISIBLE_DEVICES=''"),
        cpu_runtime.nnscaler_on_cpu(),
    ):
        pass
