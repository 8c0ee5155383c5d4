"""How the gradients of ranks that hold the same parameters come together: one choice, checked once.

By FSDP2 in the backward pass (zero_stage 2 and 3), by `sum_gradients` after it (zero_stage 0), or
by DeepSpeed, which gets a configuration and does the rest.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from nnscaler_ring.training.deepspeed_config import make_deepspeed_config, require_deepspeed
from nnscaler_ring.training.fsdp import shard_parameters
from nnscaler_ring.training.gradients import sum_gradients
from nnscaler_ring.training.mesh_dims import MeshDims

MB = 10**6
BUCKET_MEGABYTES = 25.0


class ReplicaGradients:
    """How the gradients of one module are summed, and what follows from that.

    Args:
        dims: of the mesh; its `replicas` hold the same parameters.
        use_deepspeed: `deepspeed_config` is made, and the parameters are left to DeepSpeed.
        zero_stage: 0, 2, 3, or 1 with DeepSpeed; None: 3 where there are replicas.
        cpu_offload: parameters, gradients and optimizer states stay in the CPU's memory.
        nvme_offload: with DeepSpeed, to the folder `nvme_path`.
        use_gradient_compression: gradients travel in bfloat16 (FSDP2, DeepSpeed).
        bucket_size: megabytes of gradients per message: of `sum_gradients`, or DeepSpeed's.
        overlap_communication: of gradients with the backward pass; None: as whoever sums does.

    Raises:
        ValueError: options that do not go together, by name.
        ImportError: DeepSpeed is asked for and not installed.
    """

    def __init__(
        self,
        dims: MeshDims,
        *,
        use_deepspeed: bool,
        zero_stage: int | None,
        cpu_offload: bool,
        nvme_offload: bool,
        nvme_path: str | None,
        use_gradient_compression: bool,
        bucket_size: float | None,
        overlap_communication: bool | None,
    ) -> None:
        self._replicas = dims.replicas
        self._cpu_offload, self._nvme_path = cpu_offload, nvme_path
        self._compress, self._overlap = use_gradient_compression, overlap_communication
        self._use_deepspeed = use_deepspeed
        self._pending: set[int] = set()
        self._bucket_bytes = int((BUCKET_MEGABYTES if bucket_size is None else bucket_size) * MB)
        if self._bucket_bytes < 1:
            raise ValueError(f"bucket_size must be above 0 megabytes or None, got {bucket_size}.")
        self.zero_stage = _zero_stage(zero_stage, use_deepspeed, dims)
        if nvme_offload != (nvme_path is not None) or (nvme_offload and not use_deepspeed):
            raise ValueError(
                f"nvme_offload needs use_deepspeed=True and a folder nvme_path, got nvme_offload="
                f"{nvme_offload}, nvme_path={nvme_path!r}, use_deepspeed={use_deepspeed}."
            )
        if use_deepspeed:
            require_deepspeed()
        elif self.zero_stage:
            _check_fsdp(self.zero_stage, bucket_size, overlap_communication)
        else:
            _check_sums(cpu_offload, use_gradient_compression, overlap_communication)

    @property
    def pending(self) -> int:
        """Parameters with a gradient that `sum` has yet to add up."""
        return len(self._pending)

    def attach(self, module: nn.Module) -> None:
        """Shard the module's parameters, or count the gradients that are to be summed."""
        if self._use_deepspeed:
            return
        if self.zero_stage:
            assert self._replicas is not None
            shard_parameters(
                module,
                self._replicas,
                reshard_after_forward=self.zero_stage == 3,
                cpu_offload=self._cpu_offload,
                compress=self._compress,
            )
        elif self._replicas is not None:
            for number, parameter in enumerate(module.parameters()):
                parameter.register_post_accumulate_grad_hook(
                    lambda _, number=number: self._pending.add(number)
                )

    def deepspeed_config(self, embed_dim: int, dtype: str) -> dict[str, Any] | None:
        """Make the configuration for `deepspeed.initialize`; None without DeepSpeed."""
        if not self._use_deepspeed:
            return None
        return make_deepspeed_config(
            embed_dim=embed_dim,
            zero_stage=self.zero_stage,
            cpu_offload=self._cpu_offload,
            nvme_path=self._nvme_path,
            compress_gradients=self._compress,
            bucket_megabytes=self._bucket_bytes / MB,
            overlap_communication=self._overlap is not False,
            dtype=dtype,
        )

    def sum(self, module: nn.Module) -> None:
        """Add up the module's gradients over the replicas, after the backward pass.

        Raises:
            RuntimeError: FSDP2 or DeepSpeed has done so already.
        """
        if self.zero_stage or self._use_deepspeed:
            raise RuntimeError(
                f"sum_gradients is for zero_stage=0, this layer has zero_stage={self.zero_stage}: "
                "its gradients are summed in the backward pass."
            )
        if self._replicas is not None:
            sum_gradients(module, self._replicas, bucket_bytes=self._bucket_bytes)
        self.forget()

    def forget(self) -> None:
        """Count nothing as pending: gradients were summed or dropped."""
        self._pending.clear()


def _zero_stage(zero_stage: int | None, use_deepspeed: bool, dims: MeshDims) -> int:
    replicated = dims.replicas is not None and dims.replicas.size() > 1
    if zero_stage is None:
        return 3 if replicated or use_deepspeed else 0
    allowed = (0, 1, 2, 3) if use_deepspeed else (0, 2, 3)
    if zero_stage not in allowed:
        raise ValueError(
            f"zero_stage must be one of {allowed} or None, got {zero_stage!r}; stage 1 shards "
            "optimizer states, for example torch.distributed.optim.ZeroRedundancyOptimizer."
        )
    if zero_stage and dims.replicas is None and not use_deepspeed:
        raise ValueError(
            f"zero_stage must be 0 or None without ranks to shard over, got {zero_stage}; pass a "
            "mesh with a 'data' or a 'sequence' dimension."
        )
    return zero_stage


def _check_sums(
    cpu_offload: bool, use_gradient_compression: bool, overlap_communication: bool | None
) -> None:
    """Refuse what FSDP2 alone can do."""
    for name, flag, usual in (
        ("cpu_offload", cpu_offload, "False"),
        ("use_gradient_compression", use_gradient_compression, "False"),
        ("overlap_communication", overlap_communication, "None or False"),
    ):
        if flag:
            raise ValueError(
                f"{name} must be {usual} with zero_stage=0, got True: FSDP2 does it; take "
                "zero_stage 2 or 3."
            )


def _check_fsdp(
    zero_stage: int, bucket_size: float | None, overlap_communication: bool | None
) -> None:
    """Refuse what FSDP2 decides by itself."""
    if bucket_size is not None:
        raise ValueError(
            f"bucket_size must be None with zero_stage={zero_stage}, got {bucket_size}: FSDP2 "
            "sums the gradients of a module in one message."
        )
    if overlap_communication is False:
        raise ValueError(
            f"overlap_communication must be None or True with zero_stage={zero_stage}, got "
            "False: FSDP2 always overlaps; take zero_stage=0."
        )
