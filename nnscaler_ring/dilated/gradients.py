"""Parameters and gradients of ranks that share the data, the sequence, or both.

The loss of a rank is that of its own tokens over the number of all tokens, so that gradients are
summed over the ranks, whichever dimension of the mesh they differ in. FSDP2 and
DistributedDataParallel would take the mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nnscaler_ring.dilated.tensor_ranks import local_part

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


def sum_gradients(module: nn.Module, mesh: DeviceMesh, bucket_bytes: int) -> None:
    """Add up the gradients of parameters that every rank of a mesh holds, after `backward`.

    A parameter without a gradient here counts as zeros: another rank may have one.

    Args:
        mesh: one dimension: all ranks that hold the same heads.
        bucket_bytes: gradients travel together in messages of about this size.
    """
    bucket: list[Tensor] = []
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradient = local_part(parameter.grad)
        if bucket and gradient.dtype != bucket[0].dtype:
            _sum_bucket(bucket, mesh)
            bucket = []
        bucket.append(gradient)
        if sum(x.numel() * x.element_size() for x in bucket) >= bucket_bytes:
            _sum_bucket(bucket, mesh)
            bucket = []
    if bucket:
        _sum_bucket(bucket, mesh)


def _sum_bucket(bucket: list[Tensor], mesh: DeviceMesh) -> None:
    flat = torch.cat([x.flatten() for x in bucket])
    dist.all_reduce(flat, group=mesh.get_group())
    for gradient, total in zip(bucket, flat.split([x.numel() for x in bucket]), strict=True):
        gradient.copy_(total.view_as(gradient))
