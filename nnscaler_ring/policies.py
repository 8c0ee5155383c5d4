"""Policies for nnscaler.parallelize: shard the sequence of a whole transformer, in one or two ways.

    nnscaler.parallelize(model, dummy, nnscaler_ring.policies.shard_sequence, ComputeConfig(4, 4))

Every op that touches the sequence is partitioned along it, from the model's inputs to the loss:
each device embeds, normalises and multiplies tokens / N, weights are on every device, and only
attention communicates. Written with nnScaler's primitives, for 0.8 and 0.9.

Note [What gathers]
    An op that cannot be partitioned along the sequence gets the whole of it, on every device.
    These do: reading `x.shape` of an activation (take sizes from the configuration, or use
    `x.view(x.size(0), -1, ...)` on inputs), flattening batch and tokens into one dimension, and
    losses with reduction="mean". Compute the loss per token and sum. The policies warn of every
    op that gathers, with its line in the model.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nnscaler_ring.nnscaler_ops import OPS, Op

logger = logging.getLogger(__name__)

Steps = tuple[tuple[str, int], ...]
"""How one op is split, outermost first: ("tokens", 2), ("heads", 2)."""

ATTENTION = {op.signature: op for op in OPS if not op.moves_rows}


def shard_sequence(graph: Any, cfg: Any, *, dim: int = 1) -> Any:
    """Split the sequence over all devices of the plan, in every op that touches it.

    Args:
        dim: where the model's inputs have their tokens: 1 for [batch, tokens, ...], 0 for packed
            ones, `functools.partial(shard_sequence, dim=0)`.

    Raises:
        ValueError: the tokens do not divide by the devices.
    """
    return _shard(graph, {"tokens": dim}, lambda _: (("tokens", cfg.plan_ngpus),))


def shard_sequence_and_heads(graph: Any, cfg: Any, *, ways: int, dim: int = 1) -> Any:
    """Attention by tokens and, `ways` times, by heads; every other op by tokens over all devices.

    Between the two, nnScaler moves activations within groups of `ways` neighbours. Use
    `functools.partial(shard_sequence_and_heads, ways=2)`.

    Raises:
        ValueError: `ways` does not divide the devices, or the KV heads; or as `shard_sequence`.
    """
    devices = cfg.plan_ngpus
    _check_ways(ways, devices)

    def steps(node: Any) -> Steps:
        if node.signature in ATTENTION:
            return ("tokens", devices // ways), ("heads", ways)
        return (("tokens", devices),)

    return _shard(graph, {"tokens": dim}, steps)


def shard_sequence_and_batch(graph: Any, cfg: Any, *, ways: int) -> Any:
    """Every op by tokens and, `ways` times, by batch, where inputs are [batch, tokens, ...].

    Use `functools.partial(shard_sequence_and_batch, ways=2)`.

    Raises:
        ValueError: `ways` does not divide the devices, or the batch; or as `shard_sequence`.
    """
    devices = cfg.plan_ngpus
    _check_ways(ways, devices)
    steps = ("tokens", devices // ways), ("batch", ways)
    return _shard(graph, {"tokens": 1, "batch": 0}, lambda _: steps)


def autodist_by_sequence(graph: Any, cfg: Any) -> Any:
    """nnScaler's autodist, which may choose everything but this: attention is split by sequence.

    Left alone, autodist splits the batch where it can, which costs no communication, or heads.
    `pas_config` is autodist's own; a `partition_constraints_path` in it is kept, and holds for
    everything but our ops. Use it by name or, as `nnscaler_ring.policies.autodist_by_sequence`, in
    the configuration of nnScaler's Trainer.

    Raises:
        ValueError: the graph has no attention op of nnscaler_ring.
    """
    from nnscaler.ir.operator import IRFwOperation
    from nnscaler.policies import pas_autodist

    signatures = {node.signature for node in graph.select(ntype=IRFwOperation)}
    found = [op for op in ATTENTION.values() if op.signature in signatures]
    if not found:
        raise ValueError(
            "autodist_by_sequence: the model must call an attention op of nnscaler_ring, got none "
            f"of {', '.join(ATTENTION)}; use the policy 'autodist'."
        )
    given = cfg.pas_config.get("partition_constraints_path")
    constraints = "".join(CONSTRAINT.format(op.signature, op.token_dim) for op in found)
    # autodist keeps the first of two constraints for the same name.
    constraints += Path(given).read_text() if given else ""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "constraints.yaml"
        file.write_text(constraints)
        config = {**cfg.pas_config, "partition_constraints_path": str(file)}
        return pas_autodist(graph, replace(cfg, pas_config=config))


CONSTRAINT = """\
- name: {}
  parent_module: ''
  allowed_partition_dims: ['0,{}']
  replica_allowed: false
"""
"""autodist's constraint for one op: input 0, q, is split along its tokens."""


def _check_ways(ways: int, devices: int) -> None:
    if ways < 1 or devices % ways:
        raise ValueError(f"ways must divide plan_ngpus, {devices}, got {ways}.")


def _shard(graph: Any, dims: Mapping[str, int], steps_of: Callable[[Any], Steps]) -> Any:
    """Partition every op along the dimensions that start at `dims` of the model's inputs."""
    from nnscaler.ir.operator import IRDataOperation, IRFwOperation

    nodes = graph.select(ntype=IRFwOperation)
    tracks = _Tracks(graph, dims)
    plans = {node: tracks.follow(node, steps_of(node)) for node in nodes}
    devices = max(_product(steps_of(node)) for node in nodes)
    if devices > 1 and not any(plans.values()):
        raise ValueError(
            "the policy must find something to split, got a model that takes no tensor with "
            f"{' and '.join(f'{kind} in dimension {dim}' for kind, dim in dims.items())} into an "
            "op that can be split there; pass dim=0 for packed tokens."
        )
    attention = [plan for node, plan in plans.items() if node.signature in ATTENTION]
    tracks.report(whole_calls=sum(not plan for plan in attention), calls=len(attention))
    _separate_consumers(graph, plans)
    for node, plan in plans.items():
        parts = [node]
        for idx, dim, num in plan:
            parts = [
                part
                for whole in parts
                for part in graph.partition(
                    whole, whole.algorithm("dim"), idx=idx, dim=dim, num=num
                )
            ]
        _assign(graph, parts if plan else graph.replicate(node, devices))
    for node in graph.select(ntype=IRDataOperation):
        _assign(graph, graph.replicate(node, devices))
    return graph


def _assign(graph: Any, parts: list[Any]) -> None:
    for device, part in enumerate(parts):
        graph.assign(part, device)


def _product(steps: Steps) -> int:
    size = 1
    for _, num in steps:
        size *= num
    return size


Plan = tuple[tuple[int, int, int], ...]
"""The same steps for one node: input, its dimension, parts. Empty: replicated."""


class _Tracks:
    """Which dimension of every tensor holds the tokens, or the batch, from the inputs on."""

    def __init__(self, graph: Any, dims: Mapping[str, int]) -> None:
        from nnscaler.graph.function.dimops import IRDimops
        from nnscaler.ir.tensor import IRSubTensor

        self._tensor_type = IRSubTensor
        # Also what is taken out of a sample: of a dictionary, or of nnScaler's data loader.
        taken = [
            x
            for node in graph.nodes()
            if not isinstance(node, IRDimops)
            and not any(isinstance(x, IRSubTensor) for x in node.inputs())
            for x in node.outputs()
        ]
        self._inputs = {
            x.parent
            for x in (*graph.inputs(), *taken)
            if isinstance(x, IRSubTensor) and not x.is_attr()
        }
        self._whole: dict[str, int] = {}  # ops that get the whole sequence -> how often
        self._dims = dims
        # kind -> full tensor -> dimension
        self._known: dict[str, dict[Any, int]] = {kind: {} for kind in dims}

    def follow(self, node: Any, steps: Steps) -> Plan:
        """The plan of a node by those of its inputs; its outputs are then known too."""
        from nnscaler.graph.function.dimops import IRDimops

        starts = {kind: self._start(node, kind) for kind in self._dims}
        found = {kind: start for kind, start in starts.items() if start is not None}
        if not found:
            return ()
        if not isinstance(node, IRDimops) or len(found) < len(self._dims):
            return self._gather(node)
        op = ATTENTION.get(node.signature)
        plan = []
        for kind, num in steps:
            idx, dim = found[kind] if kind != "heads" else (0, (op or OPS[0]).token_dim + 1)
            if not self._split(node, kind, idx, dim, num, op):
                return self._gather(node)
            plan.append((idx, dim, num))
        return tuple(step for step in plan if step[2] > 1)

    def _start(self, node: Any, kind: str) -> tuple[int, int] | None:
        """The first input whose dimension of this kind is known; else a model input's."""
        known = self._known[kind]
        tensors = [
            (idx, x) for idx, x in enumerate(node.inputs()) if isinstance(x, self._tensor_type)
        ]
        for idx, x in tensors:
            if x.parent in known:
                return idx, known[x.parent]
        if any(x.parent in others for others in self._known.values() for _, x in tensors):
            return None
        for idx, x in tensors:
            dim = self._dims[kind]
            if x.parent in self._inputs and dim < len(x.shape) and self._may_split(node, idx, dim):
                return idx, dim
        return None

    def _may_split(self, node: Any, idx: int, dim: int) -> bool:
        from nnscaler.graph.function.dimops import IRDimops

        if not isinstance(node, IRDimops):
            return False
        return bool(node.algorithm("dim").satisfy(idx=idx, dim=dim, num=1))

    def _split(self, node: Any, kind: str, idx: int, dim: int, num: int, op: Op | None) -> bool:
        """Whether a node can be split so that all its tensors agree; its outputs are then known."""
        size = node.input(idx).shape[dim]
        if op is not None and size % num:
            raise ValueError(
                f"{op.name}: {kind} must divide by the {num} parts of the plan, got {size} in q of "
                f"shape {list(node.input(0).shape)}; pad them, or choose another plan."
            )
        algorithm = node.algorithm("dim")
        if not algorithm.satisfy(idx=idx, dim=dim, num=num):
            if op is not None:
                raise ValueError(
                    f"{op.name}: cannot be split {num} ways by {kind}: {node.anno}; with grouped "
                    "heads the KV heads must divide by it."
                )
            return False
        rule = algorithm.infer(idx, dim, num)
        known = self._known.get(kind, {})
        for x, split in zip(node.inputs(), rule.inputs(), strict=True):
            tracked = isinstance(x, self._tensor_type) and x.parent in known
            gathered = op is not None and op.whole_keys and split.isR()
            if tracked and not gathered and split.dims != (known[x.parent],):
                return False
        # A reduction that nnScaler takes for whole although every part has reduced its own only.
        if any(split.isR() for split in rule.outputs()):
            return False
        for x, split in zip(node.outputs(), rule.outputs(), strict=True):
            if kind in self._known and split.isD():
                (known[x.parent],) = split.dims
        return True

    def _gather(self, node: Any) -> Plan:
        line = f"{node.signature} in {node.comment or 'no line of the model'}"
        self._whole[line] = self._whole.get(line, 0) + 1
        return ()

    def report(self, *, whole_calls: int, calls: int) -> None:
        """Warn, once, of all ops that could not be split, with their lines in the model.

        Args:
            whole_calls: calls of attention, of so many, that are not split either.
        """
        if self._whole:
            lines = [
                f"  {line}{f' ({times} times)' if times > 1 else ''}"
                for line, times in self._whole.items()
            ]
            logger.warning(
                "%d op(s) cannot be split along the sequence, and each device gets the whole "
                "sequence for them, and for %d of %d call(s) of attention; see 'Traps' in "
                "docs/nnscaler.md:\n%s",
                sum(self._whole.values()),
                whole_calls,
                calls,
                "\n".join(lines),
            )


def _separate_consumers(graph: Any, plans: Mapping[Any, Plan]) -> None:
    """Give every consumer of a tensor that is wanted in several ways a reference of its own."""
    from nnscaler.ir.tensor import IRSubTensor

    wanted: dict[Any, set[Any]] = {}
    for node, plan in plans.items():
        for idx, x in enumerate(node.inputs()):
            if isinstance(x, IRSubTensor):
                wanted.setdefault(x.parent, set()).add(_view(node, plan, idx))
    for x in graph.outputs():
        if isinstance(x, IRSubTensor) and x.parent in wanted:
            wanted[x.parent].add("output")
    for tensor, ways in wanted.items():
        if len(ways) > 1:
            graph.multiref(tensor, comment="nnscaler_ring.policies")


def _view(node: Any, plan: Plan, idx: int) -> Any:
    """How a node sees one input: its ranges in every part, or "whole"."""
    if not plan:
        return "whole"
    parts = [node]
    for step_idx, dim, num in plan:
        split = partial(_instantiate, idx=step_idx, dim=dim, num=num)
        parts = [part for whole in parts for part in split(whole)]
    return tuple(tuple(map(tuple, part.input(idx).indmap)) for part in parts)


def _instantiate(node: Any, *, idx: int, dim: int, num: int) -> list[Any]:
    parts: list[Any] | None = node.algorithm("dim").instantiate(idx=idx, dim=dim, num=num)
    if not parts:
        raise ValueError(f"{node.signature} cannot be split {num} ways along {idx}, {dim}.")
    return parts
