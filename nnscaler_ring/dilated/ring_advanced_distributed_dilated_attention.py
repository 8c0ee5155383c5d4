"""`RingAdvancedDistributedDilatedAttention`: the multi-head module on a mesh of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nnscaler_ring.core.ranks.groups import group_of, group_string, traffic
from nnscaler_ring.dilated.arguments import refuse_unless
from nnscaler_ring.dilated.limits import BufferLimits
from nnscaler_ring.dilated.ring_dilated_attention import CALLS_REMEMBERED
from nnscaler_ring.dilated.ring_multihead_dilated_attention import RingMultiheadDilatedAttention
from nnscaler_ring.training.checkpoints import TrainingCheckpoints
from nnscaler_ring.training.mesh_dims import MeshDims
from nnscaler_ring.training.monitoring import Monitor
from nnscaler_ring.training.replica_gradients import ReplicaGradients

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class RingAdvancedDistributedDilatedAttention(RingMultiheadDilatedAttention):
    """`RingMultiheadDilatedAttention` over a DeviceMesh with any of the dimensions "data",
    "sequence" and "tensor".

    Ranks along "data" have other batch entries, along "sequence" other shards of the sequence,
    along "tensor" other heads. The loss of a rank is that of its tokens over the number of all
    tokens; gradients are summed over "data" and "sequence": by FSDP2 (zero_stage 2 and 3) in the
    backward pass, by `sum_gradients` after it (zero_stage 0). docs/dilated.md says of every
    argument whether it is honoured.

    Args:
        embed_dim to dtype, num_kv_heads to cache_size: see `RingMultiheadDilatedAttention`.
        model_parallel, sequence_parallel, data_parallel: whether the mesh has the dimension
            "tensor", "sequence", "data"; None: as the mesh is.
        use_deepspeed: `deepspeed_config` is made for `deepspeed.initialize`, and the parameters
            are left to it.
        zero_stage: 0: every rank has the parameters; 2, 3: FSDP2 shards them (3: also between
            forward and backward). 1: only with DeepSpeed. None: 3 on a mesh whose "data" and
            "sequence" have several ranks.
        cpu_offload: parameters, gradients and optimizer states stay in the CPU's memory.
        nvme_offload: with DeepSpeed, to `nvme_path`.
        use_8bit_optimizer: must be False.
        use_gradient_compression: gradients travel in bfloat16 (FSDP2, DeepSpeed).
        activation_checkpointing: as use_checkpointing.
        communication_backend: what the mesh must communicate with; None: whatever it does.
        bucket_size: megabytes of gradients per message: of `sum_gradients`, or DeepSpeed's.
        overlap_communication: of gradients with the backward pass: FSDP2 always does, DeepSpeed
            if asked, `sum_gradients` never; None: so.
        enable_fault_tolerance: see `RingDilatedAttention`.
        checkpoint_interval, auto_resume: of `training_checkpoints`.
        enable_monitoring, profile_memory, log_level: see `Monitor`.
        mesh: None, or a mesh with named dimensions, on all of its ranks.
        nvme_path: a folder, for nvme_offload.

    Raises:
        ValueError, NotImplementedError: an argument that cannot be honoured, by name.
        ImportError: DeepSpeed is asked for and not installed.
    """

    deepspeed_config: dict[str, Any] | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dropout: float = 0.0,
        bias: bool = True,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        model_parallel: bool | None = None,
        sequence_parallel: bool | None = None,
        data_parallel: bool | None = None,
        use_deepspeed: bool = False,
        zero_stage: int | None = None,
        cpu_offload: bool = False,
        nvme_offload: bool = False,
        use_8bit_optimizer: bool = False,
        use_gradient_compression: bool = False,
        activation_checkpointing: bool = True,
        communication_backend: str | None = None,
        bucket_size: float | None = None,
        overlap_communication: bool | None = None,
        enable_fault_tolerance: bool = True,
        checkpoint_interval: int = 1000,
        auto_resume: bool = True,
        enable_monitoring: bool = True,
        profile_memory: bool = False,
        log_level: str = "INFO",
        block_size: int | None = None,
        ring_size: int | None = None,
        use_tf32: bool | None = None,
        use_flash_attention: bool | None = None,
        compile_model: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mesh: DeviceMesh | None = None,
        nvme_path: str | None = None,
        num_kv_heads: int | None = None,
        head_offsets: str = "mod",
        exchange: str = "direct",
        kernel: str = "auto",
        limits: BufferLimits | None = None,
        cache_size: int = CALLS_REMEMBERED,
    ) -> None:
        dims = MeshDims.of(
            mesh,
            tensor=model_parallel,
            sequence=sequence_parallel,
            data=data_parallel,
        )
        super().__init__(
            embed_dim,
            num_heads,
            segment_lengths,
            dilation_rates,
            dropout=dropout,
            bias=bias,
            layer_norm=layer_norm,
            layer_norm_eps=layer_norm_eps,
            gamma_init=gamma_init,
            block_size=block_size,
            ring_size=ring_size,
            use_checkpointing=activation_checkpointing,
            use_tf32=use_tf32,
            use_flash_attention=use_flash_attention,
            compile_model=compile_model,
            device=device,
            dtype=dtype,
            num_kv_heads=num_kv_heads,
            head_offsets=head_offsets,
            exchange=exchange,
            kernel=kernel,
            process_group=dims.sequence,
            limits=limits,
            cache_size=cache_size,
            enable_fault_tolerance=enable_fault_tolerance,
            _ranks=dims.heads(),
        )
        refuse_unless("use_8bit_optimizer", use_8bit_optimizer, False)
        _check_backend(communication_backend, dims)
        if checkpoint_interval < 1:
            raise ValueError(f"checkpoint_interval must be at least 1, got {checkpoint_interval}.")
        self.checkpoint_interval, self.auto_resume = checkpoint_interval, auto_resume
        self.monitor = Monitor(log_level, profile_memory) if enable_monitoring else None
        if profile_memory and not enable_monitoring:
            raise ValueError("profile_memory must be False without enable_monitoring, got True.")
        self.mesh, self._dims = mesh, dims
        self._gradients = ReplicaGradients(
            dims,
            use_deepspeed=use_deepspeed,
            zero_stage=zero_stage,
            cpu_offload=cpu_offload,
            nvme_offload=nvme_offload,
            nvme_path=nvme_path,
            use_gradient_compression=use_gradient_compression,
            bucket_size=bucket_size,
            overlap_communication=overlap_communication,
        )
        self.zero_stage = self._gradients.zero_stage
        self.deepspeed_config = self._gradients.deepspeed_config(
            embed_dim, str(self.qkv_weight.dtype).removeprefix("torch.")
        )
        self._gradients.attach(self)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Does what `RingMultiheadDilatedAttention.forward` does."""
        with self._monitored():
            return super().forward(*args, **kwargs)

    def sum_gradients(self) -> None:
        """Add up gradients over "data" and "sequence", after `backward`; for zero_stage 0.

        Raises:
            RuntimeError: FSDP2 or DeepSpeed has done so already.
        """
        self._gradients.sum(self)

    def training_checkpoints(
        self, folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> TrainingCheckpoints:
        """Make what saves a training run every `checkpoint_interval` steps, and resumes it."""
        return TrainingCheckpoints(
            folder,
            model,
            optimizer,
            interval=self.checkpoint_interval,
            auto_resume=self.auto_resume,
        )

    def get_memory_info(self) -> dict[str, Any]:
        """Tells what the class above tells, and how many gradients are yet to be summed."""
        info = super().get_memory_info()
        info["pending_gradient_reductions"] = self._gradients.pending
        info["mesh"] = self._dims.sizes()
        info["zero_stage"] = self.zero_stage
        return info

    def cleanup(self) -> None:
        """Free caches, gradients, and what the device's allocator keeps; the layer can go on."""
        self.clear_cache(force=True)
        self.zero_grad(set_to_none=True)
        self._gradients.forget()

    def _monitored(self) -> Any:
        if self.monitor is None or torch.compiler.is_compiling():
            return nullcontext()
        return self.monitor.forward(lambda: traffic(self.process_group).total_bytes)


def _check_backend(wanted: str | None, dims: MeshDims) -> None:
    if wanted is None:
        return
    mesh = dims.sequence or dims.replicas or dims.tensor
    used = None if mesh is None else dist.get_backend(group_of(group_string(mesh)))
    if used != wanted:
        raise ValueError(
            f"communication_backend must be what the mesh communicates with, {used}, or None, got "
            f"{wanted!r}; it is chosen in init_process_group."
        )
