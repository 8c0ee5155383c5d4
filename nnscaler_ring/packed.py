"""Which rows of packed documents a rank holds: for data loaders, positions and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from nnscaler_ring.core.op.checks import check_cu_seqlens_values, check_packed_layout
from nnscaler_ring.core.plan.layout import LAYOUTS, PackedDocuments
from nnscaler_ring.core.plan.shared_units import SharedUnits
from nnscaler_ring.core.plan.span import even_lens
from nnscaler_ring.core.ranks.groups import mesh_place, mesh_strings
from nnscaler_ring.core.token_index import token_index

if TYPE_CHECKING:
    from nnscaler_ring.core.ranks.groups import ProcessGroupLike


def packed_rows(
    cu_seqlens: Tensor | Sequence[int],
    process_group: ProcessGroupLike | None,
    *,
    layout: str = "folded",
) -> Tensor:
    """The rows of the packed sequence that this rank holds, in its order; nothing is sent.

    `x[packed_rows(cu_seqlens, group)]` turns any tensor of the whole packed sequence (token ids,
    labels, loss weights) into this rank's shard, as `wrap_ring_attn_varlen_func` wants it with the
    same `layout`. A data loader may so read a rank's tokens alone.

    Args:
        cu_seqlens: [documents + 1] ints or an integer tensor: where documents start and end.
        process_group: as in `wrap_ring_attn_func`, or a mesh of (sequence, heads), whose rows share
            what one rank would hold; None: all rows.
        layout: "folded" (equal tokens and equal causal work on every rank) or "contiguous". Ranks
            differ by at most one token; where they do, the op wants `packed_shard_lens`.

    Returns:
        int64 [tokens of this rank], on the CPU.

    Raises:
        ValueError: cu_seqlens does not start at 0 or falls, or another layout.
    """
    documents, block = _packed(cu_seqlens, process_group, layout)
    return token_index(documents.positions(block))


def packed_positions(
    cu_seqlens: Tensor | Sequence[int],
    process_group: ProcessGroupLike | None,
    *,
    layout: str = "folded",
) -> Tensor:
    """The position in its document of every row of `packed_rows`, for RoPE and the like.

    The arguments and errors are those of `packed_rows`.

    Returns:
        int64 [tokens of this rank], on the CPU.
    """
    documents, block = _packed(cu_seqlens, process_group, layout)
    return token_index([span.positions for span in documents.spans(block)])


def packed_shard_lens(
    cu_seqlens: Tensor | Sequence[int], process_group: ProcessGroupLike | None
) -> list[int]:
    """How many rows every rank holds, in block order: as even as can be, in either layout."""
    rows, columns, *_ = mesh_place(*mesh_strings(process_group))
    units = even_lens(_bounds(cu_seqlens)[-1], rows)
    return [length for unit in units for length in even_lens(unit, columns)]


def _packed(
    cu_seqlens: Tensor | Sequence[int], process_group: ProcessGroupLike | None, layout: str
) -> tuple[PackedDocuments, int]:
    check_packed_layout(layout)
    rows, columns, row, column = mesh_place(*mesh_strings(process_group))
    bounds = _bounds(cu_seqlens)
    units = LAYOUTS[layout].for_shards(even_lens(bounds[-1], rows), bounds)
    tokens = SharedUnits(units, columns)
    return PackedDocuments(tokens, bounds, bounds), row * columns + column


def _bounds(cu_seqlens: Tensor | Sequence[int]) -> tuple[int, ...]:
    values = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens
    bounds = tuple(int(value) for value in values)
    if len(bounds) < 2:
        raise ValueError(
            f"cu_seqlens must be [documents + 1] for at least one document, got {list(bounds)}."
        )
    check_cu_seqlens_values("cu_seqlens", bounds, bounds[-1])
    return bounds
