"""A rank's share of a context, and the origins whose last hour lies in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from examples.energy_forecasting.features import Features
from examples.energy_forecasting.model import Forecaster
from nnscaler_ring import zigzag_positions
from nnscaler_ring.core.plan.layout import Zigzag


def forecast_window(
    model: Forecaster,
    features: Features,
    start: int,
    stop: int,
    origins: Sequence[int],
    group: list[int] | None,
) -> tuple[Tensor, Tensor]:
    """Forecasts of the origins that this rank owns, from the context [start, stop).

    Args:
        origins: in (start, stop]; an origin's last known hour is the one before.

    Returns:
        The origins of this rank, int64 [n], and quantiles [n, longest, quantiles], scaled.
    """
    rows = zigzag_positions(stop - start, group)
    shard_lens = Zigzag(stop - start, len(group or [0])).shard_lens
    tokens = features.tokens(start + rows).unsqueeze(0).to(model.embed.weight.dtype)
    known_by_token = model(tokens, rows.unsqueeze(0), shard_lens)[0]
    place = torch.full((stop - start,), -1)
    place[rows] = torch.arange(len(rows))
    wanted = torch.tensor(list(origins), dtype=torch.int64)
    local = place[wanted - 1 - start]
    mine, local = wanted[local >= 0], local[local >= 0]
    base, known, _ = features.ahead(mine)
    dtype = known_by_token.dtype
    return mine, model.head(known_by_token[local], base.to(dtype), known.to(dtype))
