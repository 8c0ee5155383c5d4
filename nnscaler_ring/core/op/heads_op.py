"""Heads against rows within a row of a mesh, as a torch.library op.

Note [Heads against rows]
    The ranks of a mesh's row hold neighbouring shards with all heads. An all-to-all gives each of
    them the rows of all, with its share of the heads: attention over the sequence then runs across
    the rows of the mesh, on fewer ranks that hold more tokens each. Afterwards the result goes the
    other way. Each direction is the adjoint of the other: a head that went to several ranks gets
    the sum of what comes back.

    Source: Jacobs et al., "DeepSpeed Ulysses", arXiv 2309.14509; with a ring across the rows, Fang
    and Zhao, "USP", arXiv 2405.07719.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnscaler_ring.core.op.call import describe, tag_of
from nnscaler_ring.core.op.prepare import transport_of
from nnscaler_ring.core.plan.heads import Heads
from nnscaler_ring.core.ranks.agreement import agree, refusing_together
from nnscaler_ring.core.ranks.groups import Place, find_place
from nnscaler_ring.core.ranks.transport import Message, Transport, connect
from nnscaler_ring.core.scores.dropout import agreed_seed

HEADS_SCHEMA = (
    "(Tensor x, int row_dim, int head_dim, str op, str group, str shares, SymInt[] row_lens, "
    "bool to_rows, SymInt new_rows, SymInt new_heads) -> Tensor"
)


@dataclass(frozen=True)
class HeadsCall:
    """One exchange of heads against rows, the same on all ranks of the row."""

    op: str
    block_order: tuple[int, ...]
    row_lens: tuple[int, ...]
    row_dim: int
    head_dim: int
    other_sizes: tuple[int, ...]
    dtype: torch.dtype
    device_type: str
    shares: str
    to_rows: bool


@dataclass(frozen=True)
class SeedCall:
    """One choice of a dropout seed, the same on all ranks of the row."""

    op: str
    block_order: tuple[int, ...]
    must_be_same: bool


def share_text(shares: Sequence[Heads]) -> str:
    """The heads of every rank as the op takes them: "0,1|2,3"."""
    return "|".join(",".join(map(str, heads)) for heads in shares)


def _shares_of(text: str) -> list[list[int]]:
    return [[int(head) for head in heads.split(",")] for heads in text.split("|")]


@torch.library.custom_op("nnscaler_ring::exchange_heads", mutates_args=(), schema=HEADS_SCHEMA)
def exchange_heads_op(
    x: Tensor,
    row_dim: int,
    head_dim: int,
    op: str,
    group: str,
    shares: str,
    row_lens: Sequence[int],
    to_rows: bool,
    new_rows: int,
    new_heads: int,
) -> Tensor:
    """x with the rows of all and this rank's share of the heads; or back, with `to_rows`.

    Args:
        x: this rank's rows with all heads; with `to_rows`, all rows with its share of the heads.
        shares: the heads of every rank of the group, as `share_text` writes them.
        row_lens: the rows of every rank of the group.
        new_rows: rows of the result.
        new_heads: heads of the result.
    """
    place = find_place(group)
    sizes = [n for dim, n in enumerate(x.shape) if dim not in (row_dim, head_dim)]
    with refusing_together(group, op):
        call = HeadsCall(
            op=op,
            block_order=place.members,
            row_lens=tuple(row_lens),
            row_dim=row_dim,
            head_dim=head_dim,
            other_sizes=tuple(sizes),
            dtype=x.dtype,
            device_type=x.device.type,
            shares=shares,
            to_rows=to_rows,
        )
    entered = agree(group, call, op, lambda: describe(call), tag=tag_of(call))
    connect(group, x.device)
    with entered:
        transport = transport_of(place, entered)
        move = _to_rows if to_rows else _to_heads
        moved = move(x.movedim((row_dim, head_dim), (0, 1)), call, place, transport, new_heads)
    return moved.movedim((0, 1), (row_dim, head_dim)).contiguous()


def _to_heads(
    x: Tensor, call: HeadsCall, place: Place, transport: Transport, new_heads: int
) -> Tensor:
    """[my rows, all heads, ...] to [rows of all, my heads, ...]."""
    shares = _shares_of(call.shares)
    gathered = x.new_empty(sum(call.row_lens), new_heads, *x.shape[2:])
    arriving = gathered.split(list(call.row_lens))
    going = [x[:, heads].contiguous() for heads in shares]
    _exchange(going, arriving, place, transport)
    return gathered


def _to_rows(
    x: Tensor, call: HeadsCall, place: Place, transport: Transport, new_heads: int
) -> Tensor:
    """[rows of all, my heads, ...] to [my rows, all heads, ...]; copies of a head are summed."""
    shares, mine = _shares_of(call.shares), call.row_lens[place.block]
    going = [rows.contiguous() for rows in x.split(list(call.row_lens))]
    arriving = [x.new_empty(mine, len(heads), *x.shape[2:]) for heads in shares]
    _exchange(going, arriving, place, transport)
    summed = x.new_zeros(mine, new_heads, *x.shape[2:])
    for heads, part in zip(shares, arriving, strict=True):
        for number, head in enumerate(heads):
            summed[:, head] += part[:, number]
    return summed


def _exchange(
    going: Sequence[Tensor], arriving: Sequence[Tensor], place: Place, transport: Transport
) -> None:
    """Send one tensor to every block and receive one from it."""
    others = [block for block in range(place.world_size) if block != place.block]
    transfer = transport.post(
        "relayout",
        [Message(block, going[block]) for block in others],
        [Message(block, arriving[block]) for block in others],
    )
    arriving[place.block].copy_(going[place.block])
    transfer.wait()


@exchange_heads_op.register_fake
def _(x: Tensor, row_dim: int, head_dim: int, *options: Any) -> Tensor:
    sizes = list(x.shape)
    sizes[row_dim], sizes[head_dim] = options[-2:]
    return x.new_empty(sizes)


def _save_heads(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.options = inputs
    row_dim, head_dim = ctx.options[:2]
    ctx.old_sizes = x.shape[row_dim], x.shape[head_dim]


def _heads_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    *options, to_rows, _, _ = ctx.options
    back = exchange_heads_op(gradient, *options, not to_rows, *ctx.old_sizes)
    return (back, *(None,) * len(ctx.options))


exchange_heads_op.register_autograd(_heads_gradient, setup_context=_save_heads)


@torch.library.custom_op(
    "nnscaler_ring::row_seed",
    mutates_args=(),
    schema="(Tensor seed, str op, str group, bool must_be_same) -> Tensor",
)
def row_seed_op(seed: Tensor, op: str, group: str, must_be_same: bool) -> Tensor:
    """The dropout seed of the first rank of a row, for all of them."""
    place = find_place(group)
    call = SeedCall(op, place.members, must_be_same)
    entered = agree(group, call, op, lambda: describe(call), tag=tag_of(call))
    connect(group, seed.device)
    with entered:
        transport = transport_of(place, entered)
        agreed = agreed_seed(seed, transport, seed.device, must_be_same=must_be_same)
    assert agreed is not None, seed
    return agreed.clone()


@row_seed_op.register_fake
def _(seed: Tensor, op: str, group: str, must_be_same: bool) -> Tensor:
    return torch.empty_like(seed)
