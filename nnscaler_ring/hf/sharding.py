"""How a batch is spread over the ranks, and what a model remembers of its group: plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers import PreTrainedModel

from nnscaler_ring.core.ranks.groups import find_place

if TYPE_CHECKING:
    from nnscaler_ring.core.ranks.groups import ProcessGroupLike

SETTINGS = "nnscaler_ring_settings"
"""The attribute of an attention module that holds its RingSettings."""


@dataclass(frozen=True, eq=False)
class RingSettings:
    """What `apply_ring_attention` was told; every attention module of the model holds the same one.

    `group` is the string by which the ops find `process_group`. `chunk_size` is the number of
    tokens of a chunk where layers attend within chunks.
    """

    process_group: ProcessGroupLike | None
    group: str
    layout: str
    packed_layout: str
    exchange: str
    chunk_size: int | None

    def __deepcopy__(self, memo: object) -> RingSettings:
        # A copy of the model belongs to the same group, and a group cannot be copied.
        return self

    @property
    def world_size(self) -> int:
        """The number of ranks that share a sequence."""
        return find_place(self.group).world_size


@dataclass(frozen=True, eq=False)
class Sharding:
    """Which rows of a batch of whole sequences this rank holds: what attention must know of it.

    It travels to the attention layers as the keyword `ring_sharding` of the model's forward, so
    that it is still there when gradient checkpointing runs a layer again.

    Args:
        layout: "contiguous", "zigzag" or "folded".
        shard_lens: tokens of every rank of the group, in block order.
        rows: int64 [tokens of this rank], on the CPU: where they stand in the whole sequence.
        cu_seqlens: for packed sequences, one tensor per batch row, int32 on the CPU: where its
            documents begin, and the total; None where every row is one document.
        last_position: the largest position id of the whole batch.
    """

    layout: str
    shard_lens: tuple[int, ...]
    rows: Tensor
    cu_seqlens: tuple[Tensor, ...] | None
    last_position: int

    def __deepcopy__(self, memo: object) -> Sharding:
        return self

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole sequence."""
        return sum(self.shard_lens)


def settings_of(model: nn.Module) -> RingSettings:
    """The settings of a model that `apply_ring_attention` has prepared, however it is wrapped.

    Raises:
        ValueError: nobody has prepared it.
    """
    for module in model.modules():
        settings = getattr(module, SETTINGS, None)
        if isinstance(settings, RingSettings):
            return settings
    raise ValueError(
        f"model must be prepared for a group of ranks, got a {type(model).__name__} that is not; "
        "call nnscaler_ring.hf.apply_ring_attention(model, process_group=...) first."
    )


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside whatever wraps it.

    Raises:
        TypeError: there is none.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(f"model must be or hold a transformers model, got {type(model).__name__}.")
