"""The dimensions of a mesh, by what the ranks along them share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nnscaler_ring.training.tensor_ranks import AllHeads, SharedHeads

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

NAMES = {
    "data": "data_parallel",
    "sequence": "sequence_parallel",
    "tensor": "model_parallel",
}
"""Dimension -> the argument that asks for it."""


@dataclass(frozen=True)
class MeshDims:
    """One-dimensional meshes with this rank; None where the mesh has no such dimension.

    `replicas` are the ranks with the same heads: "data" and "sequence" together.
    """

    data: DeviceMesh | None = None
    sequence: DeviceMesh | None = None
    tensor: DeviceMesh | None = None
    replicas: DeviceMesh | None = None

    @classmethod
    def of(
        cls,
        mesh: DeviceMesh | None,
        *,
        data: bool | None,
        sequence: bool | None,
        tensor: bool | None,
    ) -> MeshDims:
        """The dimensions of a mesh, which has those that are True and no others.

        Raises:
            ValueError: the mesh does not fit.
        """
        names = () if mesh is None else mesh.mesh_dim_names or ()
        if mesh is not None and (not names or not set(names) <= set(NAMES)):
            raise ValueError(
                f"mesh must have dimensions named out of {tuple(NAMES)}, got {names or 'no names'}."
            )
        wanted = {"data": data, "sequence": sequence, "tensor": tensor}
        for name, flag in wanted.items():
            if flag is not None and flag != (name in names):
                raise ValueError(
                    f"{NAMES[name]} must be {name in names} or None for a mesh with dimensions "
                    f"{tuple(names)}, got {flag}; give the mesh a dimension {name!r}, or leave it "
                    "out."
                )
        if mesh is None:
            return cls()
        return cls(
            **{name: mesh[name] for name in names},
            replicas=_flat(mesh, [name for name in names if name != "tensor"]),
        )

    def heads(self) -> AllHeads:
        """Who shares the heads."""
        return AllHeads() if self.tensor is None else SharedHeads.of(self.tensor)

    def sizes(self) -> dict[str, int]:
        """Ranks along each dimension that there is."""
        meshes = {"data": self.data, "sequence": self.sequence, "tensor": self.tensor}
        return {name: mesh.size() for name, mesh in meshes.items() if mesh is not None}


def _flat(mesh: DeviceMesh, names: list[str]) -> DeviceMesh | None:
    if not names:
        return None
    return mesh[names[0]] if len(names) == 1 else mesh[tuple(names)]._flatten()
