"""A module's process group, in a form that can be copied and saved with the module.

torch's `ProcessGroup` is a connection: it can be neither copied nor pickled, and a module that has
one as a plain attribute cannot be either.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def kept_group() -> Any:
    """The attribute `process_group` of a module class: any form of a group, None included.

    A copy of the module has the same group. A module that was saved and loaded has it, too, if
    there is a process group of that name and with these ranks where it is loaded; else the list of
    its global ranks, from which a group is made at the first call. Other forms (ranks, meshes) are
    copied and saved by their own means.
    """

    def get(module: Any) -> Any:
        return module._kept_group.group

    def set_(module: Any, group: Any) -> None:
        module._kept_group = _Kept(group)

    return property(get, set_, doc="The ranks that share the sequence, in block order; or None.")


class _Kept:
    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> _Kept:
        return self

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        if not isinstance(self.group, dist.ProcessGroup):
            return _Kept, (self.group,)
        ranks = tuple(dist.get_process_group_ranks(self.group))
        return _find, (self.group.group_name, ranks)


def _find(name: str, ranks: tuple[int, ...]) -> _Kept:
    """The group of that name and these ranks; else the ranks."""
    if dist.is_initialized():
        for group in [dist.group.WORLD, *dist.distributed_c10d._world.pg_map]:
            if (
                group is not None
                and group.group_name == name
                and tuple(dist.get_process_group_ranks(group)) == ranks
            ):
                return _Kept(group)
    return _Kept(list(ranks))
