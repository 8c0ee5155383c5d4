"""What a rank does: enter nnScaler on the CPU, generate and load a module, read its code."""

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

import nnscaler_ring  # noqa: F401 (registers the ops when nnscaler is imported)
from nnscaler_ring.cpu_runtime import nnscaler_on_cpu
from nnscaler_ring.tools.launch import torchrun_environment


@contextmanager
def nnscaler_ranks() -> Iterator[Any]:
    """nnScaler on this rank of a gloo world, as under torchrun."""
    os.environ.update(torchrun_environment(dist.get_rank(), dist.get_world_size()))
    with nnscaler_on_cpu():
        import nnscaler
        from nnscaler.flags import RuntimeFlag

        nnscaler.init()
        # A rank of the pool may have built an optimizer before, after which reducers wait for it.
        RuntimeFlag.skip_reducer = RuntimeFlag.skip_zero_grad = False
        yield nnscaler


def parallelize(
    nnscaler: Any,
    module: Any,
    dummy: dict[str, Any],
    policy: Callable[..., Any] | str,
    plan_ngpus: int,
    **config: Any,
) -> tuple[Any, str]:
    """The parallel module, and this rank's generated code."""
    folder = shared_folder()
    config = {"trace_strategy": "cpu", **config}
    compute_config = nnscaler.ComputeConfig(plan_ngpus, dist.get_world_size(), **config)
    try:
        parallel = nnscaler.parallelize(
            module, dummy, policy, compute_config, gen_savedir=folder, instance_name=folder.name
        )
        return parallel, generated_code(folder)
    finally:
        dist.barrier()  # nnScaler refuses on all ranks or on none
        if dist.get_rank() == 0:
            shutil.rmtree(folder)


def shared_folder() -> Path:
    """A new folder, the same on all ranks; its name is a Python identifier."""
    names = [f"nnring_{uuid.uuid4().hex[:12]}"]
    dist.broadcast_object_list(names)
    folder = Path(tempfile.gettempdir()) / names[0]
    folder.mkdir(exist_ok=True)
    return folder


def generated_code(folder: Path, rank: int | None = None) -> str:
    """The code that nnScaler generated for a rank."""
    rank = dist.get_rank() if rank is None else rank
    (file,) = folder.rglob(f"gencode{rank}.py")
    return file.read_text()
