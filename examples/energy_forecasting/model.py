"""The forecaster: a decoder reads a long hourly context, a head corrects a seasonal naive.

Every hour is a token and attends to all earlier hours of the context, on whatever rank they lie.
Because attention is causal, one pass over a context gives a forecast at each of its hours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.energy_forecasting.config import DAY, Config
from examples.energy_forecasting.features import BASE_WIDTH, calendar_width
from nnscaler_ring.models import DecoderLayer
from nnscaler_ring.models.rms_norm import RMSNorm
from nnscaler_ring.models.rope import rope_rotation

if TYPE_CHECKING:
    from nnscaler_ring.core.ranks.groups import ProcessGroupLike


class Forecaster(nn.Module):
    """Token features in, quantiles of the coming hours out.

    Args:
        config: the run.
        token_width: channels of a token.
        process_group: None, or the ranks that share the context. Tokens lie in zigzag order, so
            that work is balanced and nothing but keys and values moves.
    """

    def __init__(
        self, config: Config, token_width: int, process_group: ProcessGroupLike | None = None
    ) -> None:
        super().__init__()
        sizes = config.model
        self.config = config
        self.embed = nn.Linear(token_width, sizes.width)
        self.layers = nn.ModuleList(
            DecoderLayer(
                sizes.width,
                sizes.hidden,
                num_heads=sizes.num_heads,
                num_kv_heads=sizes.num_kv_heads,
                head_dim=sizes.head_dim,
                layout="zigzag",
                balanced=True,
                process_group=process_group,
            )
            for _ in range(sizes.num_layers)
        )
        self.norm = RMSNorm(sizes.width)
        self.head = Head(config)

    def forward(
        self, tokens: Tensor, positions: Tensor, shard_lens: Sequence[int] | None = None
    ) -> Tensor:
        """What each token knows: [1, tokens, width].

        Args:
            tokens: [1, tokens, token_width], this rank's.
            positions: int64 [1, tokens], where they stand in the context.
            shard_lens: tokens that each block holds, where they differ.
        """
        x = self.embed(tokens)
        rotation = rope_rotation(positions, self.config.model.head_dim, x.dtype)
        for layer in self.layers:
            x = layer(x, rotation, shard_lens)
        return self.norm(x)


class Head(nn.Module):
    """What a token knows, and what is known of each hour ahead -> quantiles of that hour."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        sizes = config.model
        self.days = -(-config.longest // DAY)
        self.longest = config.longest
        self.to_days = nn.Linear(sizes.width, self.days * sizes.day_width)
        self.from_day = nn.Linear(sizes.day_width, sizes.head_width, bias=False)
        self.from_token = nn.Linear(sizes.width, sizes.head_width, bias=False)
        self.from_known = nn.Linear(calendar_width(config) + BASE_WIDTH, sizes.head_width)
        self.mix = nn.Linear(sizes.head_width, sizes.head_width)
        self.out = nn.Linear(sizes.head_width, len(sizes.quantiles))
        nn.init.zeros_(self.out.weight)  # untrained, it forecasts the seasonal naive
        nn.init.zeros_(self.out.bias)

    def forward(self, token: Tensor, base: Tensor, known: Tensor) -> Tensor:
        """[n, longest, quantiles], scaled.

        Args:
            token: [n, width] of the last hour before each origin.
            base, known: of `Features.ahead`.
        """
        days = self.to_days(token).unflatten(-1, (self.days, -1))
        hours = self.from_day(days).repeat_interleave(DAY, dim=1)[:, : self.longest]
        x = F.gelu(self.from_known(known) + hours + self.from_token(token).unsqueeze(1))
        x = x + F.gelu(self.mix(x))
        return base.unsqueeze(-1) + self.out(x)


def pinball_loss(forecast: Tensor, actual: Tensor, config: Config) -> Tensor:
    """Sum over origins of the mean pinball loss, every horizon counting alike.

    Args:
        forecast: [n, longest, quantiles].
        actual: [n, longest]; NaN is left out.

    Source: Koenker and Bassett, "Regression Quantiles", Econometrica 46 (1978).
    """
    levels = torch.tensor(config.model.quantiles, dtype=forecast.dtype)
    seen = ~torch.isnan(actual)
    error = torch.where(seen, actual, 0.0).unsqueeze(-1) - forecast
    loss = torch.maximum(levels * error, (levels - 1) * error).mean(-1) * seen
    parts = [
        loss[:, :horizon].sum(1) / seen[:, :horizon].sum(1).clamp(min=1)
        for horizon in config.horizons
    ]
    return torch.stack(parts).mean(0).sum()
