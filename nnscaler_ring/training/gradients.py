"""Gradients of ranks that share the data, the sequence, or both, added up after the backward pass.

The loss of a rank is that of its own tokens over the number of all tokens. The gradient of the
whole loss is then the sum of the ranks' gradients. `DistributedDataParallel` and FSDP2 by
themselves take the mean.

Note [Summed once]
    A gradient that was summed is the same on every rank. If a further backward pass adds to it and
    it is summed once more, the part that was summed before counts once for every rank: wrong by a
    factor, and nothing looks amiss. So a summed gradient carries a mark, and a pair of hooks on its
    parameter sees whether a backward pass adds to it before it is zeroed. Then the next sum is
    refused, on all ranks. Summing again what nobody has added to changes nothing.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nnscaler_ring.core.ranks.groups import Place, find_place, group_string
from nnscaler_ring.training.tensor_ranks import local_part

if TYPE_CHECKING:
    from nnscaler_ring.core.ranks.groups import ProcessGroupLike

BUCKET_BYTES = 25 * 10**6


def sum_gradients(
    model: nn.Module, process_group: ProcessGroupLike | None, *, bucket_bytes: int = BUCKET_BYTES
) -> None:
    """Add up every parameter's gradient over the ranks of a group, in place.

    Call it once for each optimizer step, on all ranks, after the backward pass of the last
    micro-batch and before gradients are clipped. Every rank then has the same bits. A parameter
    that has a gradient on some ranks only counts as zeros on the others; one that no rank uses
    keeps None. Gradients are added in their own dtype; sparse ones stay sparse. Parameters that are
    DTensors over other ranks (tensor parallelism, FSDP2 over another dimension of the mesh) are
    summed shard by shard.

    Each call costs two messages of a few bytes, and the gradients.

    Args:
        model: the same on every rank of the group.
        process_group: the ranks that share the sequence or the data; None: nothing happens.
        bucket_bytes: gradients travel together, in messages of about this size.

    Raises:
        ValueError: on every rank: the models differ; a parameter is a DTensor over the ranks of the
            group, whose gradient the backward pass has reduced already; a gradient is dense on one
            rank and sparse on another.
        RuntimeError: on every rank: a backward pass has added to gradients that were summed before;
            see Note [Summed once].
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes must be at least 1, got {bucket_bytes}.")
    place = find_place(group_string(process_group))
    if place.world_size == 1:
        return
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _agree(parameters, place)
    counts = _count(parameters, place)
    _refuse_added(counts, place)
    _refuse_mixed(counts)
    for name in [name for name, count in counts.items() if count.sparse]:
        _sum_sparse(parameters[name], place)
    dense = [parameters[name] for name, count in counts.items() if count.dense]
    for bucket in _buckets(dense, bucket_bytes):
        _sum_bucket(bucket, place.group)
    for parameter in parameters.values():
        if parameter.grad is not None:
            _mark(parameter.grad, SUMMED)
            _Watch.install(parameter)


# What is compared before anything is added.


def _agree(parameters: Mapping[str, nn.Parameter], place: Place) -> None:
    """Raise on all ranks if the models differ, or if one of them cannot be summed."""
    described = [
        f"{name}: {tuple(local_part(p).shape)}, {p.dtype}" for name, p in parameters.items()
    ]
    error = _refusal(parameters, place)
    digest = hashlib.blake2b("\n".join(described).encode(), digest_size=7).digest()
    mine = [int.from_bytes(digest, "big"), int(error is not None)]
    found = _gather_numbers(mine, place)
    if len(set(map(tuple, found))) == 1 and error is None:
        return
    texts: list[tuple[str | None, list[str]]] = [(None, [])] * place.world_size
    dist.all_gather_object(texts, (error, described), group=place.group)
    # By block, so that every rank says the same.
    ordered = [(place.global_rank(n), *texts[member]) for n, member in enumerate(place.members)]
    for rank, text, _ in ordered:
        if text is not None:
            raise ValueError(f"sum_gradients on rank {rank}: {text}")
    (first, _, one), *others = ordered
    for rank, _, other in others:
        for side, names, elsewhere in ((first, one, other), (rank, other, one)):
            alone = next((line for line in names if line not in elsewhere), None)
            if alone is not None:
                there = rank if side == first else first
                raise ValueError(
                    "sum_gradients: model must have the same trainable parameters on every rank; "
                    f"rank {side} has {alone}, which rank {there} has not."
                )
    raise ValueError("sum_gradients: model must name its parameters in one order on every rank.")


def _refusal(parameters: Mapping[str, nn.Parameter], place: Place) -> str | None:
    """Why this rank's gradients cannot be summed over the group; None if they can."""
    members = {place.global_rank(block) for block in range(place.world_size)}
    others = members - {place.global_rank(place.block)}
    for name, parameter in parameters.items():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is not None and (shared := others & set(mesh.mesh.flatten().tolist())):
            return (
                f"parameter {name!r} is a DTensor over ranks {sorted(shared)} of process_group, so "
                "the backward pass reduces its gradient over them; leave sum_gradients out (FSDP2 "
                "takes the mean there, unless nnscaler_ring.training.shard_parameters has made it "
                "a sum), or pass the group of the ranks that hold the same shard."
            )
        gradient = parameter.grad
        layouts = (torch.strided, torch.sparse_coo)
        if gradient is not None and gradient.layout not in layouts:
            return f"the gradient of {name!r} must be dense or sparse_coo, got {gradient.layout}."
    return None


class _Count(NamedTuple):
    """How many ranks have what kind of gradient of one parameter."""

    dense: int
    sparse: int
    summed: int
    added_to: int


def _count(parameters: Mapping[str, nn.Parameter], place: Place) -> dict[str, _Count]:
    mine = []
    for parameter in parameters.values():
        gradient = parameter.grad
        state = None if gradient is None else _state_of(gradient)
        fresh = gradient is not None and state is None
        sparse = gradient is not None and gradient.is_sparse
        mine.append([fresh and not sparse, fresh and sparse, state == SUMMED, state == ADDED_TO])
    if not mine:
        return {}
    flags = torch.tensor(mine, dtype=torch.int32, device=_device_for_numbers(place.group))
    dist.all_reduce(flags, group=place.group)
    return {
        name: _Count(*numbers) for name, numbers in zip(parameters, flags.tolist(), strict=True)
    }


def _refuse_added(counts: Mapping[str, _Count], place: Place) -> None:
    wrong = [
        name
        for name, count in counts.items()
        if count.added_to or 0 < count.summed < place.world_size
    ]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise RuntimeError(
            f"sum_gradients: the gradient of {wrong[0]!r}{more} was summed over the ranks before, "
            "and a backward pass has added to it since, so the earlier sum would count once for "
            "every rank; call sum_gradients once for each optimizer step, after the last "
            "micro-batch, and zero_grad before the next."
        )


def _refuse_mixed(counts: Mapping[str, _Count]) -> None:
    for name, count in counts.items():
        if count.dense and count.sparse:
            raise ValueError(
                f"sum_gradients: the gradient of {name!r} is dense on {count.dense} rank(s) and "
                f"sparse on {count.sparse}; make it the same on all ranks."
            )


# The sums.


def _buckets(parameters: list[nn.Parameter], bucket_bytes: int) -> Iterator[list[Tensor]]:
    """This rank's part of each gradient, by dtype and device, in messages of about that size."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradient = local_part(parameter.grad)
        bucket = kinds.setdefault((gradient.dtype, gradient.device), [])
        bucket.append(gradient)
        if sum(x.numel() * x.element_size() for x in bucket) >= bucket_bytes:
            yield kinds.pop((gradient.dtype, gradient.device))
    yield from kinds.values()


def _sum_bucket(bucket: list[Tensor], group: dist.ProcessGroup | None) -> None:
    flat = torch.cat([x.detach().flatten() for x in bucket])
    dist.all_reduce(flat, group=group)
    with torch.no_grad():
        for gradient, total in zip(bucket, flat.split([x.numel() for x in bucket]), strict=True):
            gradient.copy_(total.view_as(gradient))


def _sum_sparse(parameter: nn.Parameter, place: Place) -> None:
    """Every rank gets the rows of all ranks, added up where they are the same."""
    gradient = parameter.grad
    mine = None if gradient is None else gradient.detach().coalesce()
    numbers = [0, 0] if mine is None else [mine._nnz(), mine.sparse_dim()]
    found = _gather_numbers(numbers, place)
    most, sparse_dims = (max(column) for column in zip(*found, strict=True))
    shape = parameter.shape
    indices = torch.zeros(sparse_dims, most, dtype=torch.int64, device=parameter.device)
    values = parameter.new_zeros(most, *shape[sparse_dims:]).detach()
    if mine is not None:
        indices[:, : mine._nnz()] = mine.indices()
        values[: mine._nnz()] = mine.values()
    all_indices = [torch.empty_like(indices) for _ in found]
    all_values = [torch.empty_like(values) for _ in found]
    dist.all_gather(all_indices, indices, group=place.group)
    dist.all_gather(all_values, values, group=place.group)
    used = [count for count, _ in found]
    parts = zip(all_indices, all_values, used, strict=True)
    kept = [(i[:, :count], v[:count]) for i, v, count in parts]
    total = torch.sparse_coo_tensor(
        torch.cat([i for i, _ in kept], dim=1), torch.cat([v for _, v in kept]), shape
    )
    parameter.grad = total.coalesce()


def _gather_numbers(mine: list[int], place: Place) -> list[list[int]]:
    """The numbers of every rank, in group-rank order."""
    numbers = torch.tensor(mine, device=_device_for_numbers(place.group))
    found = [torch.empty_like(numbers) for _ in place.members]
    dist.all_gather(found, numbers, group=place.group)
    return [x.tolist() for x in found]


def _device_for_numbers(group: dist.ProcessGroup | None) -> torch.device:
    """Where a backend can read a few integers."""
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


# Note [Summed once].

SUMMED = "summed"
ADDED_TO = "summed, then added to"
MARK = "_nnscaler_ring_sum"


def _mark(gradient: Tensor, state: str | None) -> None:
    setattr(gradient, MARK, state)


def _state_of(gradient: Tensor) -> str | None:
    """`SUMMED`, `ADDED_TO`, or None of a gradient that is this rank's own part."""
    state: str | None = getattr(gradient, MARK, None)
    if state is not None and _is_zero(gradient):
        return None  # zero_grad(set_to_none=False) keeps the tensor
    return state


def _is_zero(gradient: Tensor) -> bool:
    part = local_part(gradient)
    return not bool((part._values() if part.is_sparse else part).any())


class _Watch:
    """The hooks of one parameter: they notice what is added to a summed gradient."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter = weakref.ref(parameter)
        self._added = False

    @classmethod
    def install(cls, parameter: nn.Parameter) -> None:
        """Install the hooks once; a copy of the parameter has none."""
        hooks = getattr(parameter, "_backward_hooks", None) or {}
        if any(isinstance(getattr(hook, "__self__", None), cls) for hook in hooks.values()):
            return
        watch = cls(parameter)
        parameter.register_hook(watch.before)
        parameter.register_post_accumulate_grad_hook(watch.after)

    def before(self, _: Tensor) -> None:
        """A backward pass is about to add to the parameter's gradient."""
        parameter = self._parameter()
        gradient = None if parameter is None else parameter.grad
        self._added = gradient is not None and _state_of(gradient) is not None

    def after(self, parameter: Tensor) -> None:
        """The backward pass has added to it."""
        if parameter.grad is not None:
            _mark(parameter.grad, ADDED_TO if self._added else None)
