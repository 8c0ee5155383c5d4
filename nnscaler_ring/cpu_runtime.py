"""nnScaler without a GPU: compile, run, train and resume its plans on CPU ranks over gloo.

    with nnscaler_on_cpu():                       # under torchrun, on every rank
        nnscaler.init()
        model = nnscaler.parallelize(..., compute_config=ComputeConfig(2, 2))
        ...                                       # as on GPUs

nnScaler asks torch.cuda for its device, and inside the block torch.cuda answers for the CPU; its
Trainer works there too. For trying plans and for tests; it is slow.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = timedelta(hours=6)
"""As long as nnScaler itself gives its process group: code generation may take that long."""


@contextmanager
def nnscaler_on_cpu() -> Iterator[None]:
    """Inside, nnScaler runs on the CPU; under torchrun a gloo group is made if there is none.

    Everything is undone on exit. Build models and call `nnscaler.init()` inside. Models are traced
    on the CPU, whatever `trace_strategy` says of CUDA. Process-wide: not for some threads only.

    Raises:
        ImportError: nnScaler is not installed.
        RuntimeError: CUDA is available; run nnScaler there.
    """
    if torch.cuda.is_available():
        raise RuntimeError(
            "nnscaler_on_cpu() is for machines without CUDA, and CUDA is available here; leave it "
            "out, or hide the GPUs with CUDA_VISIBLE_DEVICES=''."
        )
    importlib.import_module("nnscaler")
    importlib.import_module("torch._dynamo")  # takes stock of torch.cuda: while it is torch's own
    substitutions = (*SUBSTITUTIONS, *_substitutions_in_nnscaler())
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in substitutions]
    for owner, name, substitute in substitutions:
        setattr(owner, name, substitute)
    joined = False
    try:
        joined = _join_gloo()
        yield
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)
        if joined and dist.is_initialized():
            dist.destroy_process_group()


def _join_gloo() -> bool:
    """Make the default group before nnScaler would make one with NCCL; whether that was needed."""
    if dist.is_initialized() or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    dist.init_process_group("gloo", timeout=TIMEOUT)
    return True


def _nothing(*_: object, **__: object) -> None:
    """For what has no meaning on the CPU: streams, synchronisation, statistics."""


def _zero(*_: object, **__: object) -> int:
    return 0


def _cpu(*_: object, **__: object) -> torch.device:
    return torch.device("cpu")


def _one(*_: object, **__: object) -> int:
    return 1


def _this_tensor(x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return x


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _memory_info(*_: object, **__: object) -> tuple[int, int]:
    return _memory_bytes(), _memory_bytes()


def _get_rng_state(*_: object, **__: object) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *_: object, **__: object) -> None:
    torch.set_rng_state(state)


class _CpuAutocast(torch.autocast):
    """torch.autocast of the CPU, also where CUDA's is asked for, as in all code of nnScaler.

    It shows as CUDA's as well, which is what nnScaler looks at while it traces.
    """

    def __init__(
        self,
        device_type: str,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:
        dtype = torch.get_autocast_dtype(device_type) if dtype is None else dtype
        super().__init__("cpu", dtype, enabled, cache_enabled)

    def __enter__(self) -> Any:
        self._of_cuda = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        torch.set_autocast_enabled("cuda", self._enabled)
        torch.set_autocast_dtype("cuda", self.fast_dtype)
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        enabled, dtype = self._of_cuda
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", dtype)
        return super().__exit__(*error)


def _substitutions_in_nnscaler() -> Iterator[tuple[Any, str, Any]]:
    """The same for names of nnScaler that would go past torch.cuda."""
    tracer = importlib.import_module("nnscaler.graph.tracer.orig_func")
    if hasattr(tracer, "torch_autocast"):
        yield tracer, "torch_autocast", _CpuAutocast
    costs = importlib.import_module("nnscaler.autodist.cost_database").CostDatabase
    profile: Callable[..., None] = costs.profile_comp

    def profile_here(
        self: Any, partition_degree: int, parallel_profile: bool, re_profile: bool
    ) -> None:
        # Processes that nnScaler spawns, one for each GPU, are without the substitutions.
        profile(self, partition_degree, parallel_profile=False, re_profile=re_profile)

    yield costs, "profile_comp", profile_here
    parallel = importlib.import_module("nnscaler.parallel")
    generate: Callable[..., Any] = parallel._gencode
    flags = importlib.import_module("nnscaler.flags").CompileFlag  # nnScaler's for one generation

    def generate_for_cpu(
        module: Any, dummy: Any, policy: Any, config: Any, *args: Any, **kw: Any
    ) -> Any:
        if getattr(config, "use_async_comm", False):
            raise ValueError(
                "use_async_comm must be False inside nnscaler_on_cpu(), got True: between pipeline "
                "stages of several ranks, nnScaler's asynchronous messages wait for each other for "
                "ever over gloo; leave it out, nothing else changes."
            )
        if flags.trace_strategy.startswith("cuda"):  # nnScaler's default
            flags.trace_strategy = "cpu"
        return generate(module, dummy, policy, config, *args, **kw)

    yield parallel, "_gencode", generate_for_cpu


def _properties(*_: object, **__: object) -> SimpleNamespace:
    # torch's compiler asks for gcnArchName.
    return SimpleNamespace(name="cpu", total_memory=_memory_bytes(), gcnArchName="")


SUBSTITUTIONS: tuple[tuple[Any, str, Any], ...] = (
    # What every program of nnScaler calls.
    (torch.cuda, "set_device", _nothing),
    (torch.cuda, "current_device", _cpu),
    (torch.cuda, "default_stream", _nothing),
    (torch.cuda, "synchronize", _nothing),
    (torch.cuda, "get_device_properties", _properties),
    (torch.Tensor, "cuda", _this_tensor),
    # What it generates for models that use autocast.
    (torch, "autocast", _CpuAutocast),
    # What the profiler of the autodist policy calls beside those.
    (torch.cuda, "device_count", _one),
    (torch.cuda, "mem_get_info", _memory_info),
    (torch.cuda, "max_memory_allocated", _zero),
    (torch.cuda, "reset_peak_memory_stats", _nothing),
    # What its Trainer calls beside those.
    (torch.cuda, "max_memory_reserved", _zero),
    (torch.cuda, "get_rng_state", _get_rng_state),
    (torch.cuda, "set_rng_state", _set_rng_state),
)
"""(owner, name, what stands in for it while `nnscaler_on_cpu` is entered)."""
