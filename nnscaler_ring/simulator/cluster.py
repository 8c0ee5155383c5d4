"""Machines: what they compute, hold and send per second. Presets and files of the same form."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

PRESETS = Path(__file__).parent / "clusters"
"""One JSON file per cluster that is known by name; a new one is a new file."""


@dataclass(frozen=True)
class Rates:
    """What attention kernels reach in one dtype, and what a call costs before it computes.

    A short call (few query rows, see `KernelTraits.is_short`) takes `short` times as long.
    """

    forward_flops_per_second: float
    backward_flops_per_second: float
    forward_call_seconds: float
    backward_call_seconds: float
    forward_short: float = 1.0
    backward_short: float = 1.0


@dataclass(frozen=True)
class Link:
    """One direction of a connection between two devices."""

    bytes_per_second: float
    latency_seconds: float

    def seconds(self, size: float) -> float:
        """How long a message of some bytes takes; an empty one is not sent."""
        return self.latency_seconds + size / self.bytes_per_second if size else 0.0


@dataclass(frozen=True)
class Cluster:
    """Devices of one kind in nodes.

    Args:
        name: for reports.
        source: where the figures come from, and which are assumptions.
        device_type: "cpu" or "cuda".
        memory_bytes: of one device.
        memory_bytes_per_second: of a device, for merging and summing.
        devices_per_node: that the link `inside` connects; `between` connects nodes.
        overlap: how much of a transfer goes on beside computing: 1 on GPUs; on a CPU, whose cores
            also move the messages, less.
        rates: by dtype.
    """

    name: str
    source: str
    device_type: str
    memory_bytes: float
    memory_bytes_per_second: float
    devices_per_node: int
    inside: Link
    between: Link
    overlap: float
    rates: dict[str, Rates]

    def link(self, rank: int, other: int) -> Link:
        """What connects two ranks, which fill node after node."""
        same = rank // self.devices_per_node == other // self.devices_per_node
        return self.inside if same else self.between

    def rates_for(self, dtype: str) -> Rates:
        """The rates of a dtype.

        Raises:
            ValueError: the cluster's file has none for it.
        """
        if dtype not in self.rates:
            raise ValueError(
                f"dtype must be one that {self.name} has rates for, {(*self.rates,)}, got "
                f"{dtype!r}; add its rates to a copy of the cluster's file."
            )
        return self.rates[dtype]

    def to_json(self) -> dict[str, Any]:
        """As it is in a file."""
        return asdict(self)


def cluster_names() -> list[str]:
    """Clusters that are known by name."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def load_cluster(name: str) -> Cluster:
    """A preset by its name, or a cluster from a JSON file by its path.

    Raises:
        ValueError: there is no such preset or file, or the file is not a cluster's.
    """
    path = PRESETS / f"{name.lower()}.json"
    if not path.exists():
        path = Path(name)
    if not path.is_file():
        raise ValueError(
            f"device must be one of {(*cluster_names(),)} or a cluster's JSON file, got {name!r}; "
            "`nnscaler-ring bench --calibrate` writes one for this machine."
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
        inside, between = Link(**data.pop("inside")), Link(**data.pop("between"))
        rates = {dtype: Rates(**figures) for dtype, figures in data.pop("rates").items()}
        cluster = Cluster(**data, inside=inside, between=between, rates=rates)
    except (AttributeError, KeyError, TypeError, ValueError, OSError, RecursionError) as error:
        told = f"{error!r}".replace("\n", " ")[:200]
        raise ValueError(
            f"device: {path} is not a cluster's file ({told}); copy one of {PRESETS}, edit it."
        ) from error
    check_cluster(cluster)
    return cluster


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def check_cluster(cluster: Cluster) -> None:
    """Whether the figures can be.

    Raises:
        ValueError: a rate or a size is not a finite number above 0, a time not one from 0 on,
            overlap not one from 0 to 1, devices_per_node not an integer; a text is none, or has
            characters that cannot be printed.
    """
    for name in ("name", "source"):
        text = getattr(cluster, name)
        if not isinstance(text, str) or not text.isprintable():
            raise ValueError(f"{name} of a cluster must be one line of text, got {_short(text)}.")
    if cluster.device_type not in ("cpu", "cuda"):
        raise ValueError(
            f"device_type of a cluster must be 'cpu' or 'cuda', got {_short(cluster.device_type)}."
        )
    nodes = cluster.devices_per_node
    if not isinstance(nodes, int) or isinstance(nodes, bool) or nodes < 1:
        raise ValueError(
            f"devices_per_node of a cluster must be an integer above 0, got {_short(nodes)}."
        )
    figures = {
        "memory_bytes": cluster.memory_bytes,
        "memory_bytes_per_second": cluster.memory_bytes_per_second,
    }
    parts: dict[str, Link | Rates] = {"inside": cluster.inside, "between": cluster.between}
    parts |= {f"rates.{dtype}": rates for dtype, rates in cluster.rates.items()}
    for part, holder in parts.items():
        figures |= {f"{part}.{f.name}": getattr(holder, f.name) for f in fields(holder)}
    for name, figure in figures.items():
        is_time = name.endswith("_seconds")
        if not _is_finite(figure) or not (figure >= 0 if is_time else figure > 0):
            bound = "0 or above" if is_time else "above 0"
            raise ValueError(
                f"{name} of a cluster must be {bound} and finite, got {_short(figure)}."
            )
    if not _is_finite(cluster.overlap) or not 0 <= cluster.overlap <= 1:
        raise ValueError(
            f"overlap of a cluster must be from 0 to 1, got {_short(cluster.overlap)}."
        )


def _is_finite(figure: object) -> bool:
    """Whether it is a number that a float can hold."""
    if not isinstance(figure, (int, float)) or isinstance(figure, bool):
        return False
    try:
        return math.isfinite(figure)
    except OverflowError:
        return False


def _short(value: object) -> str:
    """A value of a file, short enough for a message of one line."""
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    text = f"{value!r}" if not isinstance(value, int) or abs(value) < 10**50 else "a huge integer"
    return text if len(text) <= 80 else f"{text[:80]}..."
