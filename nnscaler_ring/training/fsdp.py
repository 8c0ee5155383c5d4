"""Parameters sharded with FSDP2, whose gradients are sums over the ranks.

The loss of a rank is that of its own tokens over the number of all tokens, so gradients are summed
over the ranks, whichever dimension of the mesh they differ in. FSDP2 by itself takes the mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard_parameters(
    module: nn.Module,
    mesh: DeviceMesh,
    *,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
    compress: bool = False,
) -> None:
    """Shard a module's parameters with FSDP2; its gradients are then sums over the mesh.

    Args:
        mesh: one dimension: all ranks that hold the same heads.
        reshard_after_forward: gather parameters again in the backward pass (ZeRO 3); else they
            stay whole in between (ZeRO 2).
        cpu_offload: parameters, gradients and optimizer states stay in the CPU's memory.
        compress: gradients travel in bfloat16, rounded.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    options: dict[str, Any] = {}
    if cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    if compress:
        options["mp_policy"] = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)
    sharded = fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward, **options)
    sharded.set_gradient_divide_factor(1.0)
    # Without it a factor of 1 is a premultiplied sum, which gloo does not have.
    sharded.set_force_sum_reduction_for_comms(True)
