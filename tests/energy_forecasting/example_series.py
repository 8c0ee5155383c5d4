"""Small settings, and the shipped excerpt."""

from dataclasses import replace
from functools import cache

from examples.energy_forecasting.cli import EXCERPT_CSV
from examples.energy_forecasting.config import EXCERPT, ModelConfig
from examples.energy_forecasting.series import HourlySeries
from examples.energy_forecasting.sources.csv_file import read_csv

SMALL = replace(
    EXCERPT,
    context=337,  # does not divide by 3 ranks, nor by 6 chunks
    steps=4,
    validate_every=2,
    origins_per_step=5,
    warm_up_origins=3,
    validation_hours=14 * 24,
    test_hours=14 * 24,
    model=ModelConfig(width=16, num_heads=2, num_kv_heads=1, head_dim=4, hidden=16, head_width=16),
)


@cache
def excerpt() -> HourlySeries:
    """Six months of the lower 48 states."""
    return read_csv(EXCERPT_CSV)
