"""All choices of a run, with their reasons."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    """A small decoder: two layers see the whole context, the head knows the calendar."""

    width: int = 64
    num_layers: int = 2
    num_heads: int = 2  # few and narrow: the year of context is what costs
    num_kv_heads: int = 2
    head_dim: int = 16
    hidden: int = 128  # of SwiGLU
    head_width: int = 64
    day_width: int = 16  # what the head knows of each day ahead
    quantiles: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Config:
    """One run."""

    context: int = 8760  # hours: a year, so that last year's season is seen
    horizons: tuple[int, ...] = (24, 168, 720)  # hours: a day, a week, a month
    recent: int = 168  # hours of raw history that each token carries: a week
    yearly: bool = True  # whether there is a year of history before the first origin
    time_zone: str = "America/New_York"  # whose clocks people follow
    holidays: str = ""  # country whose public holidays the calendar knows; none in older runs
    validation_hours: int = 8760  # before the test
    test_hours: int = 8784  # 2024 was a leap year
    steps: int = 180  # validation stops falling about there
    origins_per_step: int = 64  # of the window's days; more cost the head's time
    warm_up_origins: int = 28  # days at a window's start without a loss: too little context
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    warmup_steps: int = 10
    clip_norm: float = 1.0
    validate_every: int = 30
    seed: int = 0
    model: ModelConfig = ModelConfig()

    @property
    def longest(self) -> int:
        """Hours of the longest horizon."""
        return max(self.horizons)

    @property
    def history(self) -> int:
        """Hours before an origin that features and baselines read, beside the context."""
        return YEAR + WEEK if self.yearly else WEEK

    def with_seed(self, seed: int) -> Config:
        """The same run from other random numbers."""
        return replace(self, seed=seed)


DAY, WEEK, YEAR = 24, 168, 52 * 168
"""Hours; a year of 52 weeks, so that weekdays meet."""

EXCERPT = Config(
    context=1008,  # six weeks of the six months that the repository ships
    horizons=(24, 168),
    yearly=False,
    validation_hours=28 * 24,
    test_hours=28 * 24,
    steps=150,
    warm_up_origins=7,
    origins_per_step=32,
)


def config_from(data: dict[str, Any]) -> Config:
    """What `dataclasses.asdict` of a Config wrote."""
    model = {name: value for name, value in data["model"].items()}
    model["quantiles"] = tuple(model["quantiles"])
    names = {f.name for f in fields(Config)}
    rest = {name: value for name, value in data.items() if name in names}
    rest["horizons"] = tuple(rest["horizons"])
    return Config(**{**rest, "model": ModelConfig(**model)})
