"""What the engine sees of an exchange: steps of keys with their tiles; gradients that come home."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from nnscaler_ring.core.plan.schedule import KeyRows
from nnscaler_ring.core.plan.tile import Tile
from nnscaler_ring.core.sums.row_sum import RowSum


class Keys(NamedTuple):
    """Keys and values [batch, keys, num_kv_heads, head_dim], and the tiles that read them.

    `rows` says whose they are: (source, start, stop) of the source's shard, one after another.
    """

    k: Tensor
    v: Tensor
    tiles: Sequence[Tile]
    rows: KeyRows


class GradientStep(NamedTuple):
    """The same in the backward pass, with the sums that take the gradients of these keys."""

    k: Tensor
    v: Tensor
    tiles: Sequence[Tile]
    rows: KeyRows
    dk: RowSum
    dv: RowSum


class KVExchange(Protocol):
    """One rank's part of an exchange, for one call."""

    def steps(self, k: Tensor, v: Tensor) -> Iterator[Keys]:
        """The steps of a forward pass; k and v are this rank's rows."""
        ...

    def gradient_steps(self, k: Tensor, v: Tensor) -> Iterator[GradientStep]:
        """The steps of a backward pass."""
        ...

    def gradients(self) -> tuple[Tensor, Tensor]:
        """(dk, dv) of this rank's rows, once `gradient_steps` is exhausted."""
        ...
