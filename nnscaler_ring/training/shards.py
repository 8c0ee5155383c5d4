"""Which tokens of a sequence this rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nnscaler_ring.core.plan.layout import LAYOUTS
from nnscaler_ring.core.plan.span import even_lens
from nnscaler_ring.core.ranks.groups import find_place, group_string
from nnscaler_ring.core.token_index import token_index

if TYPE_CHECKING:
    from nnscaler_ring.core.ranks.groups import ProcessGroupLike


def even_shard_lens(tokens: int, process_group: ProcessGroupLike | None) -> list[int]:
    """The `shard_lens` of a sequence cut as evenly as it can be: block i of N holds tokens
    `[i*T//N, (i+1)*T//N)`.

    Args:
        tokens: of the whole sequence.
    """
    ranks = find_place(group_string(process_group)).world_size
    return list(even_lens(tokens, ranks))


def positions_of_shard(
    tokens: int,
    process_group: ProcessGroupLike | None,
    *,
    layout: str = "contiguous",
    shard_lens: Sequence[int] | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Where this rank's tokens stand in the whole sequence: int64 [1, tokens].

    Args:
        tokens: that this rank holds.
        layout: "contiguous" or "zigzag".
        shard_lens: tokens of every block where they differ.
    """
    place = find_place(group_string(process_group))
    lens = list(shard_lens or [tokens] * place.world_size)
    held = LAYOUTS[layout].for_shards(lens).positions(place.block)
    return token_index(held, device).unsqueeze(0)
