"""Plans for one attention call, and the groups that they must give."""

from dataclasses import dataclass
from typing import Any

DENSE_DIMS = {"batch": 0, "sequence": 1, "heads": 2}
PACKED_DIMS = {"sequence": 0, "heads": 1}


@dataclass(frozen=True)
class Plan:
    """How one call is split: steps outermost first, then devices in the order of the parts.

    `groups[device]` is what that device's generated code must hold as process_group.
    """

    name: str
    steps: tuple[tuple[str, int], ...]
    groups: tuple[tuple[int, ...] | None, ...]
    devices: tuple[int, ...] = ()
    runtime_ngpus: int = 0

    @property
    def plan_ngpus(self) -> int:
        """Devices of a scale unit."""
        size = 1
        for _, num in self.steps:
            size *= num
        return size

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.runtime_ngpus or self.plan_ngpus


PLANS = (
    Plan("sequence", (("sequence", 2),), ((0, 1),) * 2),
    Plan("batch", (("batch", 2),), (None, None)),
    Plan("heads", (("heads", 2),), (None, None)),
    Plan("sequence over 4", (("sequence", 4),), ((0, 1, 2, 3),) * 4),
    Plan("sequence twice", (("sequence", 2), ("sequence", 2)), ((0, 1, 2, 3),) * 4),
    Plan("batch x sequence", (("batch", 2), ("sequence", 2)), ((0, 1), (0, 1), (2, 3), (2, 3))),
    Plan("heads x sequence", (("heads", 2), ("sequence", 2)), ((0, 1), (0, 1), (2, 3), (2, 3))),
    Plan(
        "sequence x heads, strided",
        (("sequence", 2), ("heads", 2)),
        ((0, 2), (1, 3), (0, 2), (1, 3)),
    ),
    Plan(
        "sequence x batch, strided",
        (("sequence", 2), ("batch", 2)),
        ((0, 2), (1, 3), (0, 2), (1, 3)),
    ),
    Plan(
        "sequence x replica",
        (("sequence", 2), ("replica", 2)),
        ((0, 2), (1, 3), (0, 2), (1, 3)),
    ),
    Plan("replica x sequence", (("replica", 2), ("sequence", 2)), ((0, 1), (0, 1), (2, 3), (2, 3))),
    Plan("heads x batch", (("heads", 2), ("batch", 2)), (None,) * 4),
    Plan(
        "sequence, 2 of 4 ranks",
        (("sequence", 2),),
        ((0, 1), (0, 1), (2, 3), (2, 3)),
        runtime_ngpus=4,
    ),
)

AGAINST_DEVICE_ORDER = Plan("sequence backwards", (("sequence", 2),), (), devices=(1, 0))
"""nnScaler's own collectives hand out blocks by device number: wrong results, so refused."""


def split(graph: Any, node: Any, plan: Plan, dims: dict[str, int]) -> None:
    """Partition one node as the plan says."""
    parts = [node]
    for kind, num in plan.steps:
        if kind == "replica":
            parts = [part for whole in parts for part in graph.replicate(whole, num)]
        else:
            parts = [
                part
                for whole in parts
                for part in graph.partition(
                    whole, whole.algorithm("dim"), idx=0, dim=dims[kind], num=num
                )
            ]
    for part, device in zip(parts, plan.devices or range(len(parts)), strict=True):
        graph.assign(part, device)
