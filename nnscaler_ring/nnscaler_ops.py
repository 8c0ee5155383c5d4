"""The public attention functions as nnScaler operators: once, for every op in `OPS`.

nnScaler traces a model that calls an op on whole tensors, partitions the call, and generates code
in which every rank calls the op on its part. It needs to know which dimensions may be partitioned
(the annotation) and, where the sequence is, which ranks hold the other blocks (the emission).

Note [Who holds the other blocks]
    The ranks of a partitioned call are read from its sub-calls: each says which part of q it
    computes and on which devices. Sub-calls that differ in their tokens alone form a group, ordered
    by tokens. So any nesting of plans is served: heads or batch beside the sequence, strided
    groups, replicas (the n-th holder of every block goes together) and several scale units (all
    device ids move by the same offset). Two calls on the same q are told apart by their results.
    nnScaler passes no graph to the emission; it is found on the stack of its code generator.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnscaler_ring.core.plan.dilation import HeadOffsets
from nnscaler_ring.core.scores.dropout import DropoutSeed
from nnscaler_ring.nnscaler_samples import dense_sample, dilated_sample, packed_sample, rows_sample

Range = tuple[int, int]

OPTIONAL_TENSORS = ("alibi_slopes", "bias", "sinks")
"""Parameters of every op that may hold a tensor, in the order in which nnScaler gets them."""


@dataclass(frozen=True)
class Op:
    """A public function as nnScaler sees it; its signature is its name in plans and constraints.

    Batch, tokens and heads may be partitioned; `packed` has no batch, and cu_seqlens after q, k, v.
    `whole_keys`: k and v are not partitioned with q's tokens. `moves_rows`: no attention, but rows
    of one tensor that change places.
    """

    module: str
    name: str
    packed: bool = False
    whole_keys: bool = False
    moves_rows: bool = False

    @property
    def signature(self) -> str:
        """nnScaler's name of the op, in policies and constraint files."""
        return f"{self.module}.{self.name}"

    @property
    def tensors(self) -> tuple[str, ...]:
        """The parameters that are nnScaler's inputs."""
        if self.moves_rows:
            return "hidden_states", "cu_seqlens"
        return ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k") if self.packed else ("q", "k", "v")

    @property
    def token_dim(self) -> int:
        """The dimension of the first input that the sequence lies along."""
        return 0 if self.packed or self.moves_rows else 1

    @property
    def function(self) -> Callable[..., Any]:
        """The public function."""
        function: Callable[..., Any] = getattr(importlib.import_module(self.module), self.name)
        return function


NNSCALER_NAMES = "nnscaler_ring.compat.nnscaler"
"""Where the ops have nnScaler's own names and parameters."""

OPS = (
    Op("nnscaler_ring.ring_attn", "wrap_ring_attn_func"),
    Op("nnscaler_ring.zigzag_attn", "wrap_zigzag_attn_func"),
    Op("nnscaler_ring.ring_attn_varlen", "wrap_ring_attn_varlen_func", packed=True),
    Op("nnscaler_ring.dilated_attn", "wrap_dilated_attn_func"),
    Op(NNSCALER_NAMES, "wrap_ring_attn_varlen_func", packed=True),
    Op(NNSCALER_NAMES, "wrap_sliding_window_attn_func", packed=True),
    Op(NNSCALER_NAMES, "wrap_zigzag_allgather_attn_varlen_func", packed=True, whole_keys=True),
    Op(NNSCALER_NAMES, "wrap_maybe_shuffle", moves_rows=True),
    Op(NNSCALER_NAMES, "wrap_maybe_unshuffle", moves_rows=True),
)
"""Every op that nnScaler may partition. A new one is one line."""


def register() -> None:
    """Tell nnScaler of every op in `OPS`; ops that it knows already stay as they are."""
    from nnscaler.graph.parser.register import CustomizedOps

    accepted = inspect.signature(CustomizedOps.register).parameters
    for op in OPS:
        if CustomizedOps.exist(op.signature):
            continue
        options: dict[str, Any] = {"emit_fn": emit, "input_gen_fn": partial(sample_inputs, op)}
        if "fake_fn" in accepted:  # since 0.9
            # With a name, which nnScaler logs where tracing takes long.
            options["fake_fn"] = update_wrapper(partial(trace, op), op.function)
        CustomizedOps.register(
            op.signature, partial(create, op), f"import {op.module}", op.function, **options
        )


def create(op: Op, *args: Any, signature: str, **kwargs: Any) -> Any:
    """nnScaler's node of one call, as the model makes it."""
    from nnscaler.ir.cten import IRTensor

    arguments = bind(op, args, kwargs)
    tensors = split_tensors(op, arguments, lambda value: isinstance(value, IRTensor))
    names = tuple(tensors)
    return create_part(op, names, *tensors.values(), signature=signature, **arguments)


def create_part(
    op: Op, names: tuple[str, ...], *tensors: Any, signature: str, **arguments: Any
) -> Any:
    """nnScaler's node of a call, or of a part that a partition makes of it; `names`: of its inputs.

    The node's keywords are those of the public function and nothing else, because nnScaler's
    profiler passes them to it.
    """
    from nnscaler.graph.function.dimops import IRDimops

    refuse_arguments(op, arguments)
    warn_of_failed_profiles(signature)
    return_lse = bool(_value(arguments.get("return_lse", False)))
    shapes = {name: tuple(x.shape) for name, x in zip(names, tensors, strict=True)}
    if op.moves_rows:
        annotation = annotate_rows(len(shapes["hidden_states"]))
    else:
        annotation = annotate(op, shapes, return_lse=return_lse)
    make_part = partial(create_part, op, names)
    return IRDimops(make_part, op.name, signature, [annotation], list(tensors), **arguments)


def tensor_names(node: Any) -> tuple[str, ...]:
    """The public function's parameters that the inputs of one of our nodes are, in their order."""
    (make_part,) = node._create_fn
    names: tuple[str, ...] = make_part.args[1]
    return names


FAILED_MILLISECONDS = 1000 * 1000
"""The time that nnScaler books for an op that it could not profile."""


def warn_of_failed_profiles(signature: str) -> None:
    """Warn where nnScaler is about to plan with times of this op that it never measured.

    nnScaler keeps them in its profile cache, where nnscaler_ring up to 0.1 left them for all ops.
    """
    frame = sys._getframe()
    while frame is not None:
        database: Any = frame.f_locals.get("self")
        if type(database).__name__ == "CostDatabase":
            times = database.db._data.get(signature, {}).values()
            if any(x.fw_span >= FAILED_MILLISECONDS for x in times):
                warnings.warn(
                    f"nnScaler's profile cache holds {FAILED_MILLISECONDS:,} ms for {signature}, "
                    "its mark of a profile that failed, and autodist would plan with it; delete "
                    f"{database.comp_profile_path / f'{signature}.json'} or pass "
                    "pas_config={'re_profile': True}.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return
        frame = frame.f_back  # type: ignore[assignment]


def split_tensors(
    op: Op, arguments: dict[str, Any], is_tensor: Callable[[object], bool]
) -> dict[str, Any]:
    """Take the tensors out of a call's arguments: nnScaler's inputs, the optional ones last."""
    tensors = {name: arguments.pop(name) for name in op.tensors}
    for name, x in tensors.items():
        if not is_tensor(x):
            raise TypeError(f"{op.name}: {name} must be a tensor, got {type(x).__name__}.")
    for name in OPTIONAL_TENSORS:
        if is_tensor(arguments.get(name)):
            tensors[name] = arguments.pop(name)
    for name, value in arguments.items():
        if is_tensor(value):
            raise ValueError(
                f"{op.name}: {name} must not be a tensor under nnScaler, which partitions "
                f"{', '.join(tensors)} alone; pass a number, or leave {name} out."
            )
    return tensors


def bind(op: Op, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, as Python itself would bind them."""
    try:
        return dict(inspect.signature(op.function).bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise TypeError(f"{op.name}: {error}") from None


def refuse_arguments(op: Op, arguments: dict[str, Any]) -> None:
    """Arguments that nnScaler decides itself, or that it could not partition."""
    for name, remedy in (
        ("process_group", "nnScaler's plan decides which ranks work together"),
        ("shard_lens", "nnScaler's shards are all equal"),
        ("shard_lens_k", "nnScaler's shards are all equal"),
    ):
        if _value(arguments.get(name)) is not None:
            raise ValueError(
                f"{op.name}: {name} must be None under nnScaler, got {arguments[name]!r}: "
                f"{remedy}; leave it out."
            )
    offsets = _value(arguments.get("head_offsets"))
    if isinstance(offsets, HeadOffsets):
        raise ValueError(
            f"{op.name}: head_offsets must be 'mod' or 'block' under nnScaler, got {offsets}: the "
            "plan says where a part of the heads begins; pass the grouping alone."
        )
    seed = _value(arguments.get("dropout_seed"))
    if isinstance(seed, DropoutSeed):
        raise ValueError(
            f"{op.name}: dropout_seed must be an int or None under nnScaler, got {seed}: the plan "
            "says where a part of the batch or of the heads begins; pass the seed alone."
        )


def annotate_rows(dims: int) -> str:
    """nnScaler's annotation of rows that change places: any dimension may be partitioned."""
    x = " ".join(["l", *(f"c{dim}" for dim in range(1, dims))])
    return f"{x}, n^ -> {x}"


def annotate(op: Op, shapes: dict[str, tuple[int, ...]], *, return_lse: bool) -> str:
    """nnScaler's annotation of a call with inputs of these shapes.

    Batch b, tokens l and the heads may be partitioned, head dims not. KV heads g and the m query
    heads of each are partitioned together; with one KV head the query heads alone are. Optional
    tensors follow: the rows of bias with the tokens, its columns whole.
    """
    q, k, v = (shapes[name] for name in ("q", "k", "v"))
    rank = 3 if op.packed else 4
    for name, shape in zip(("q", "k", "v"), (q, k, v), strict=True):
        if len(shape) != rank:
            raise ValueError(
                f"{op.name}: {name} must have {rank} dimensions, got shape {list(shape)}."
            )
    if q[:-2] != k[:-2] and not op.whole_keys:
        raise ValueError(
            f"{op.name}: under nnScaler k must have q's {'tokens' if op.packed else 'batch and'}"
            f"{'' if op.packed else ' tokens'}, {list(q[:-2])}, got {list(k[:-2])}: one plan "
            "shards them together; pad the packed keys with a document of their own, or call the "
            "op outside parallelize()."
        )
    num_heads, num_kv_heads = q[-2], k[-2]
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"{op.name}: num_heads of q must be a multiple of num_kv_heads, got {num_heads} and "
            f"{num_kv_heads}."
        )
    heads, kv_heads = {
        num_heads: ("h", "h"),
        1: ("h", "1"),
    }.get(num_kv_heads, (f"(g {num_heads // num_kv_heads})", "g"))
    batch = "" if op.packed else "b "
    keys = "k^" if op.whole_keys else "l"
    inputs = {"q": f"{batch}l {heads} d^", "k": f"{batch}{keys} {kv_heads} d^"}
    inputs |= {"v": f"{batch}{keys} {kv_heads} e^", "cu_seqlens_q": "n^", "cu_seqlens_k": "n^"}
    if "alibi_slopes" in shapes:
        inputs["alibi_slopes"] = f"{'b ' if len(shapes['alibi_slopes']) == 2 else ''}{heads}"
    if "bias" in shapes:
        leading = shapes["bias"][:-2]
        wide = [(1 if op.packed else q[0], batch.strip()), (num_heads, heads)][-len(leading) :]
        names = [name if n == size else "1" for n, (size, name) in zip(leading, wide, strict=True)]
        inputs["bias"] = " ".join([*names, "l", "k^"])
    inputs["sinks"] = heads
    outputs = [f"{batch}l {heads} e^"]
    if return_lse:
        outputs.append(f"{batch}{heads} l")
    return f"{', '.join(inputs[name] for name in shapes)} -> {', '.join(outputs)}"


def emit(
    node: Any,
    args: Sequence[str],
    kwargs: dict[str, str],
    runtime_devid: int,
    plan_ndevs: int,
    runtime_ndevs: int,
) -> str:
    """The code of one (sub-)call on one rank: the public function with its process_group."""
    op = next(op for op in OPS if op.signature == node.signature)
    mine, whole = _ranges(node.input(0).indmap), tuple(node.input(0).parent.shape)
    split_dims = [n for n, part in enumerate(mine) if part != (0, whole[n])]
    dropout = _value(node.kwargs.get("dropout_p", 0.0))
    calls = list(_sub_calls(node)) if split_dims or dropout else []
    names = tensor_names(node)
    for x, name in enumerate(names):
        sums = [n.input(x).grad for n in calls if n.input(x).grad is not None]
        if name != "alibi_slopes" and any(tuple(grad.valmap) != (0, 1) for grad in sums):
            parts = [(_ranges(n.input(x).indmap), tuple(n.device)) for n in calls]
            refuse_mixed_sums(op.name, name, parts)
    ranks = None
    if op.token_dim in split_dims:
        device = runtime_devid % plan_ndevs
        blocks = find_blocks(
            op.name,
            mine,
            [(_ranges(n.input(0).indmap), tuple(n.device)) for n in calls],
            token_dim=op.token_dim,
            total=whole[op.token_dim],
        )
        offset = runtime_devid - device
        ranks = tuple(rank + offset for rank in group_of_device(op.name, blocks, device))
        refuse_zigzag_order(op, node.kwargs)
        refuse_lone_ranks(op, node.kwargs)
    given = len(op.tensors)
    options = {**dict(zip(names[given:], args[given:], strict=True)), **kwargs}
    if "alibi_slopes" in names:
        # nnScaler gives every float input a gradient; slopes have none.
        options["alibi_slopes"] += ".detach()"
    if dropout:
        refuse_replicated_dropout(
            op, node.kwargs, [n for n in calls if _ranges(n.input(0).indmap) == mine]
        )
        # Dropout draws by global batch row and head, which a part of them does not know.
        first_batch, first_head = 0 if op.packed else mine[0][0], mine[-2][0]
        seed = kwargs.get("dropout_seed")
        options["dropout_seed"] = f"nnscaler_ring.DropoutSeed({seed}, {first_batch}, {first_head})"
    keys = node.input(1)
    if op.name == "wrap_dilated_attn_func" and keys.shape[-2] != keys.parent.shape[-2]:
        # Offsets go by the KV head's number among all, which a part of them does not know.
        first, total = _ranges(keys.indmap)[-2][0], keys.parent.shape[-2]
        grouping = kwargs.get("head_offsets", repr("mod"))
        options["head_offsets"] = f"nnscaler_ring.HeadOffsets({grouping}, {first}, {total})"
    options["process_group"] = repr(ranks)
    call = [*args[:given], *(f"{name}={value}" for name, value in options.items())]
    return f"{node.signature}({', '.join(call)})"


def refuse_zigzag_order(op: Op, kwargs: dict[str, Any]) -> None:
    """nnScaler's blocks are contiguous, so the caller's layout must be too."""
    if _value(kwargs.get("layout", "contiguous")) != "contiguous":
        raise ValueError(
            f"{op.name}: layout must be 'contiguous' where nnScaler partitions the sequence, got "
            f"{kwargs['layout']!r}: its shards are contiguous, and the op moves the rows itself; "
            "leave layout out."
        )


def refuse_lone_ranks(op: Op, kwargs: dict[str, Any]) -> None:
    """A rank with a part of the tokens cannot compute alone what cu_seqlens say of all."""
    if not _value(kwargs.get("enable_ring", True)):
        raise ValueError(
            f"{op.name}: enable_ring must be True where nnScaler partitions the tokens, got False: "
            "cu_seqlens are those of all tokens; partition the heads, or replicate the call."
        )


def refuse_replicated_dropout(op: Op, kwargs: dict[str, Any], replicas: Sequence[Any]) -> None:
    """Replicas must drop the same positions, and each would draw a seed of its own."""
    devices = sorted(device for node in replicas for device in node.device)
    if _value(kwargs.get("dropout_seed")) is None and len(devices) > 1:
        raise ValueError(
            f"{op.name}: dropout_seed must be given where nnScaler replicates a part of the call, "
            f"got None and the same part on devices {devices}: each would draw its own seed; "
            "partition the call instead, or pass dropout_seed."
        )


def refuse_mixed_sums(
    name: str, tensor: str, parts: Sequence[tuple[tuple[Range, ...], tuple[int, ...]]]
) -> None:
    """Plans for which nnScaler's own gradient sums come back in the wrong order.

    Where sub-calls share a part of a tensor (one KV head with query heads partitioned, or sinks
    with tokens partitioned), nnScaler scatters the sum of its gradients over the devices that share
    it and gathers all parts by device number. The rows are right only if the devices of every part
    follow those of the part before.

    Args:
        parts: the ranges and devices of every sub-call, where gradients are summed.
    """
    holders: dict[tuple[Range, ...], list[int]] = {}
    for ranges, devices in parts:
        holders.setdefault(ranges, []).extend(devices)
    order = [device for ranges in sorted(holders) for device in sorted(holders[ranges])]
    if order != sorted(order):
        plan = "; ".join(f"{list(r)} on {sorted(holders[r])}" for r in sorted(holders))
        raise ValueError(
            f"{name}: the plan must give devices that share a part of {tensor} numbers in a row, "
            f"got ranges and devices {plan}: nnScaler would mix up the gradient of {tensor}; "
            f"partition along the dimensions that {tensor} has first, and along the others last."
        )


class Blocks(NamedTuple):
    """The token ranges of a group in order, and the devices that hold each of them."""

    ranges: tuple[Range, ...]
    holders: tuple[tuple[int, ...], ...]


def find_blocks(
    name: str,
    mine: tuple[Range, ...],
    parts: Sequence[tuple[tuple[Range, ...], tuple[int, ...]]],
    *,
    token_dim: int,
    total: int,
) -> Blocks:
    """The blocks of the sequence that belong with `mine`. See Note [Who holds the other blocks].

    Args:
        mine: the part of q that a sub-call computes, as one range per dimension.
        parts: the same for every sub-call of the call, with its devices.
        total: tokens of the whole sequence.

    Raises:
        ValueError: the blocks are not equal parts of the whole sequence, a device holds two, or
            blocks are not in the order of their devices.
    """

    def others(ranges: tuple[Range, ...]) -> tuple[Range, ...]:
        return ranges[:token_dim] + ranges[token_dim + 1 :]

    holders: dict[Range, list[int]] = {}
    for ranges, devices in parts:
        if others(ranges) == others(mine):
            holders.setdefault(ranges[token_dim], []).extend(devices)
    ordered = sorted(holders)
    blocks = Blocks(tuple(ordered), tuple(tuple(sorted(holders[r])) for r in ordered))
    plan = "; ".join(
        f"tokens {start} to {stop} on device(s) {list(devices)}"
        for (start, stop), devices in zip(blocks.ranges, blocks.holders, strict=True)
    )
    remedy = "partition the call with graph.partition() along q's tokens, or nnscaler_ring.policies"
    ends = [0, *(stop for _, stop in ordered)]
    if [start for start, _ in ordered] + [total] != ends:
        raise ValueError(
            f"{name}: the plan must hold every token of {total} once per group, got {plan}; "
            f"{remedy}."
        )
    if len({stop - start for start, stop in ordered}) > 1:
        raise ValueError(f"{name}: the plan must have equal blocks, got {plan}; {remedy}.")
    if len({len(devices) for devices in blocks.holders}) > 1:
        raise ValueError(
            f"{name}: the plan must hold every block as many times as the others, got {plan}; "
            f"{remedy}, with all blocks replicated alike."
        )
    everybody = [device for devices in blocks.holders for device in devices]
    columns = zip(*blocks.holders, strict=True)
    if any(list(column) != sorted(column) for column in columns):
        raise ValueError(
            f"{name}: the plan must put later blocks on devices with higher numbers, got {plan}: "
            "nnScaler's own collectives hand out blocks by device number; assign sub-nodes to "
            "devices in order."
        )
    if len(set(everybody)) < len(everybody):
        raise ValueError(
            f"{name}: the plan must not give a device two blocks of one call, got {plan}; assign "
            "each sub-node a device of its own."
        )
    return blocks


def group_of_device(name: str, blocks: Blocks, device: int) -> tuple[int, ...]:
    """The devices that compute together with this one, in block order."""
    for devices in blocks.holders:
        if device in devices:
            return tuple(others[devices.index(device)] for others in blocks.holders)
    raise ValueError(f"{name}: device {device} holds no block of the plan {blocks}.")


def _sub_calls(node: Any) -> Iterator[Any]:
    """All sub-calls of the call that `node` is a part of, itself included."""
    from nnscaler.ir.operator import IRFwOperation

    for other in _graph_being_emitted(node).select(ntype=IRFwOperation):
        # Not by q: where it has several consumers, nnScaler gives every device a copy of its own.
        if other.signature == node.signature and other.output(0).parent == node.output(0).parent:
            yield other


def _graph_being_emitted(node: Any) -> Any:
    frame = sys._getframe()
    while frame is not None:
        generator = frame.f_locals.get("self")
        graph = getattr(getattr(generator, "execplan", None), "graph", None)
        if graph is not None:
            return graph
        frame = frame.f_back  # type: ignore[assignment]
    raise ValueError(
        f"{node.signature}: the sequence cannot be partitioned: this version of nnScaler generates "
        "code in a way that hides the plan; partition batch or heads, or use nnScaler 0.8 or 0.9."
    )


def trace(op: Op, *args: Any, **kwargs: Any) -> Any:
    """What the tracer runs instead of the op: all checks, the shapes, and nothing computed.

    The whole sequence lies on one device while nnScaler traces, where attention itself would take
    the time of the whole model.
    """
    arguments = bind(op, args, kwargs)
    tensors = split_tensors(op, arguments, lambda value: isinstance(value, Tensor))
    refuse_arguments(op, arguments)
    with torch.no_grad():
        on_meta = {name: x.to("meta") for name, x in tensors.items()}
        shapes = op.function(**on_meta, **arguments)
    # Zero, but connected to the inputs, so that the tracer sees what needs a gradient.
    q, floats = tensors[op.tensors[0]], [x for x in tensors.values() if x.is_floating_point()]
    zero = sum(x.flatten()[:1].sum().to(q.dtype) * 0 for x in floats)
    outputs = [
        torch.zeros(x.shape, dtype=x.dtype, device=q.device) + zero.to(x.dtype)
        for x in (shapes if isinstance(shapes, tuple) else (shapes,))
    ]
    return tuple(outputs) if isinstance(shapes, tuple) else outputs[0]


def sample_inputs(op: Op, node: Any) -> tuple[Tensor, ...]:
    """Inputs with which nnScaler's profiler may time a (sub-)call."""
    optional = tensor_names(node)[len(op.tensors) :]
    if op.moves_rows:
        return rows_sample(node)
    if op.packed:
        return packed_sample(node, optional)
    if op.name == "wrap_dilated_attn_func":
        return dilated_sample(node)
    balanced = op.name == "wrap_zigzag_attn_func" and _value(node.kwargs.get("causal", True))
    return dense_sample(node, optional, causal_zigzag=balanced)


def _ranges(indmap: Any) -> tuple[Range, ...]:
    return tuple((int(start), int(stop)) for start, stop in indmap)


def _value(x: Any) -> Any:
    """The value of a constant that nnScaler wraps because it comes from traced data."""
    return getattr(x, "value", x)
