"""What happens to scores beside scale and mask: softcap, ALiBi, bias, dropout. Tile by tile.

The order is flash-attn's: scale, softcap, bias and ALiBi, mask, softmax, dropout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nnscaler_ring.core.plan.schedule import Schedule
from nnscaler_ring.core.plan.tile import KernelCall, Segments
from nnscaler_ring.core.scores.coordinates import (
    Coordinates,
    KeyRows,
    key_coordinates,
    query_coordinates,
)
from nnscaler_ring.core.scores.dropout import Dropout
from nnscaler_ring.core.sums.online_softmax import accumulation_dtype


@dataclass(frozen=True)
class ScoreMods:
    """What a kernel does to the scores of one tile, nq query rows and nk keys.

    Args:
        softcap: scores become `softcap * tanh(scores / softcap)`; 0 for none.
        alibi_slopes: [batch or 1, num_heads]; scores get `-slope * |distance of positions|`.
        bias: [batch or 1, num_heads or 1, nq, nk], added.
        needs_dbias: the backward pass must return the gradient of `bias`.
        dropout: which probabilities are dropped.
        q, k: coordinates of the rows and of the keys.
    """

    softcap: float
    alibi_slopes: Tensor | None
    bias: Tensor | None
    needs_dbias: bool
    dropout: Dropout | None
    q: Coordinates
    k: Coordinates

    def additions(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores, broadcastable to [batch, num_heads, nq, nk]; None: 0."""
        added = None if self.bias is None else self.bias.to(dtype)
        if self.alibi_slopes is not None:
            distance = (self.q.positions.unsqueeze(1) - self.k.positions).abs()
            alibi = -self.alibi_slopes.to(dtype)[..., None, None] * distance
            added = alibi if added is None else added + alibi
        return added

    def dropout_factors(self, batch: int, num_heads: int, dtype: torch.dtype) -> Tensor | None:
        """What probabilities are multiplied by, [batch, num_heads, nq, nk]; None: 1."""
        if self.dropout is None:
            return None
        return self.dropout.factors(batch, num_heads, self.q.tokens, self.k.tokens, dtype)


class TileScores(NamedTuple):
    """How the scores of one kernel call come about, and which keys its rows see.

    Args:
        softmax_scale: the factor of q·k.
        window: flash-attn's `(left, right)`: bottom-right aligned, -1 for unbounded.
        mods: what else happens to the scores; None for nothing.
        segments: where a call of several tiles is cut (Note [Tiles in one call] in tile.py); None
            for one tile.
    """

    softmax_scale: float
    window: tuple[int, int] = (-1, -1)
    mods: ScoreMods | None = None
    segments: Segments | None = None


class Scores:
    """How one call computes its scores, on one rank.

    Args:
        softmax_scale: the factor of q·k.
        schedule, rank: whose rows stand where; needed by all that follows.
        softcap, alibi_slopes, dropout: as in `ScoreMods`.
        bias: [batch or 1, num_heads or 1, this rank's computed query rows, all keys by token].
        needs_dbias: the gradient of bias is wanted.
    """

    def __init__(
        self,
        softmax_scale: float,
        schedule: Schedule | None = None,
        rank: int = 0,
        *,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        bias: Tensor | None = None,
        needs_dbias: bool = False,
        dropout: Dropout | None = None,
    ) -> None:
        self.softmax_scale = softmax_scale
        self._by_position = not (alibi_slopes is None and bias is None and dropout is None)
        self.plain = not softcap and not self._by_position
        assert self.plain or schedule is not None
        self._schedule = schedule
        self._rank = rank
        self._softcap = softcap
        self._slopes = alibi_slopes
        self._bias = bias
        self._dropout = dropout
        self._dbias: Tensor | None = None
        if needs_dbias and bias is not None:
            self._dbias = torch.zeros_like(
                bias, dtype=accumulation_dtype(bias.dtype), memory_format=torch.contiguous_format
            )

    def of_keys(self, rows: KeyRows, device: torch.device) -> StepScores:
        """For the tiles of a step whose keys are `rows`."""
        if self.plain or self._schedule is None:
            return StepScores(self, None, None)
        queries = query_coordinates(self._schedule, self._rank)
        keys = key_coordinates(self._schedule, rows)
        if self._by_position:  # a softcap reads neither, and a copy to the device makes it wait
            queries, keys = queries.to(device), keys.to(device)
        return StepScores(self, queries, keys)

    def dbias(self) -> Tensor | None:
        """The gradient of bias once every tile's backward is done; None where it is not wanted."""
        return self._dbias


class StepScores:
    """`Scores` for the keys of one step."""

    def __init__(self, scores: Scores, q: Coordinates | None, k: Coordinates | None) -> None:
        self._scores = scores
        self._q = q
        self._k = k

    def of(self, tile: KernelCall) -> TileScores:
        """How the kernel computes the scores of a call."""
        scale = self._scores.softmax_scale
        return TileScores(scale, tile.window(), self._mods(tile), tile.segments)

    def _mods(self, tile: KernelCall) -> ScoreMods | None:
        if self._q is None or self._k is None:
            return None
        scores, k = self._scores, Coordinates(*(x[tile.k] for x in self._k))
        bias = scores._bias
        if bias is not None:
            bias = _columns(bias[..., tile.q, :], k.tokens)
        return ScoreMods(
            softcap=scores._softcap,
            alibi_slopes=scores._slopes,
            bias=bias,
            needs_dbias=scores._dbias is not None,
            dropout=scores._dropout,
            q=Coordinates(*(x[tile.q] for x in self._q)),
            k=k,
        )

    def take_dbias_(self, tile: KernelCall, block: Tensor | None) -> None:
        """Add the gradient of a tile's bias, [batch, num_heads, nq, nk], where bias is from."""
        dbias = self._scores._dbias
        if dbias is None or block is None or self._k is None:
            return
        for dim in (0, 1):
            if dbias.shape[dim] == 1:
                block = block.sum(dim, keepdim=True)
        rows, tokens = dbias[..., tile.q, :], self._k.tokens[tile.k]
        if (runs := _runs(tokens)) is None:
            rows.index_add_(-1, tokens, block.to(dbias.dtype))
            return
        for (start, stop), part in zip(runs, _parts(block, runs), strict=True):
            rows[..., start:stop].add_(part)


MOST_RUNS = 16
"""Of neighbouring tokens in the keys of a tile: more are looked up one by one."""


def _runs(tokens: Tensor) -> list[tuple[int, int]] | None:
    """Tokens as runs [start, stop) of neighbours; None on a GPU, where looking waits, or of many.

    A slice is copied 30 times as fast as as many columns of a matrix are looked up.
    """
    if tokens.device.type != "cpu":
        return None
    firsts = torch.cat(
        [torch.zeros(1, dtype=torch.int64), 1 + (tokens.diff() != 1).nonzero()[:, 0]]
    )
    if len(firsts) > MOST_RUNS:
        return None
    lengths = torch.cat([firsts[1:], torch.tensor([len(tokens)])]) - firsts
    starts = tokens[firsts]
    return list(zip(starts.tolist(), (starts + lengths).tolist(), strict=True))


def _parts(x: Tensor, runs: list[tuple[int, int]]) -> tuple[Tensor, ...]:
    return x.split([stop - start for start, stop in runs], dim=-1)


def _columns(x: Tensor, tokens: Tensor) -> Tensor:
    """The columns of `tokens`: a view where they are neighbours."""
    if (runs := _runs(tokens)) is None:
        return x.index_select(-1, tokens)
    slices = [x[..., start:stop] for start, stop in runs]
    return slices[0] if len(slices) == 1 else torch.cat(slices, dim=-1)
