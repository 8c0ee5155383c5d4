"""The ranks that share a layer's heads (tensor parallelism): parameters as DTensors, and sums.

Every one of them gets the same input and gives the same output. Collectives are DTensor's, so that
each has its gradient and checkpointing can save its result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class AllHeads:
    """One rank, which has all heads: nothing to share."""

    rank: int = 0
    size: int = 1

    def share(self, parameter: nn.Parameter, dim: int | None) -> nn.Parameter:
        """This rank's part of a parameter along `dim`; None: the whole on every rank."""
        return parameter

    def local(self, parameter: Tensor) -> Tensor:
        """The part as a plain tensor."""
        return parameter

    def enter(self, x: Tensor) -> Tensor:
        """The same x; its gradient is the sum over the ranks."""
        return x

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks, for what every rank computes alike."""
        return x

    def total_for_parts(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks, for what each rank uses in its own part."""
        return x


@dataclass(frozen=True)
class SharedHeads(AllHeads):
    """The ranks of a one-dimensional mesh, each with an equal part of the heads."""

    mesh: DeviceMesh | None = None

    @classmethod
    def of(cls, mesh: DeviceMesh) -> SharedHeads:
        """This rank's part."""
        return cls(mesh.get_local_rank(), mesh.size(), mesh)

    def share(self, parameter: nn.Parameter, dim: int | None) -> nn.Parameter:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        assert self.mesh is not None
        whole = parameter.detach()
        if dim is None:
            return nn.Parameter(
                DTensor.from_local(whole, self.mesh, [Replicate()], run_check=False)
            )
        part = whole.tensor_split(self.size, dim)[self.rank].clone()
        return nn.Parameter(DTensor.from_local(part, self.mesh, [Shard(dim)], run_check=False))

    def local(self, parameter: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        assert isinstance(parameter, DTensor), parameter
        part: Tensor = parameter.to_local()
        return part

    def enter(self, x: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Partial, Replicate

        same = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)
        entered: Tensor = same.to_local(grad_placements=[Partial()])
        return entered

    def total(self, x: Tensor) -> Tensor:
        summed: Tensor = self._sum(x).to_local()  # type: ignore[attr-defined]
        return summed

    def total_for_parts(self, x: Tensor) -> Tensor:
        from torch.distributed.tensor import Partial

        summed: Tensor = self._sum(x).to_local(  # type: ignore[attr-defined]
            grad_placements=[Partial()]
        )
        return summed

    def _sum(self, x: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Partial, Replicate

        parts = DTensor.from_local(x, self.mesh, [Partial()], run_check=False)
        return parts.redistribute(placements=[Replicate()])


def local_part(x: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be a DTensor."""
    part: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return part


COLLECTIVES = (
    torch.ops._c10d_functional.all_reduce.default,
    torch.ops._c10d_functional.wait_tensor.default,
)
"""What the sums above are made of, for checkpointing that repeats none of them."""
