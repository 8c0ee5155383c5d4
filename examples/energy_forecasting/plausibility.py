"""Values that cannot be: what the published hours of EIA-930 hold beside demand.

They hold 2147483647 MW, the largest 32-bit integer, and negative demand. One such hour moves the
scaler of a whole series, and one is a forecast's worst error.
"""

from __future__ import annotations

import numpy as np

DEMAND, ANY = "demand", "any"
QUANTITIES = (DEMAND, ANY)
"""What a column may be: demand, which is never below 0, or anything, such as a price."""

PLACEHOLDER = 2**31 - 1
TIMES_THE_MEDIAN = 10
MOST_IMPLAUSIBLE = 0.02
"""With a larger share of implausible values, more than a day of them, a column is no demand."""

RULE = (
    f"demand below 0 or above {TIMES_THE_MEDIAN} times its median, anything of {PLACEHOLDER:,} or "
    "more in size"
)


def implausible(values: np.ndarray, quantity: str) -> np.ndarray:
    """Which values count as missing: see `RULE`. NaN is not among them.

    Demand's median is that of its plausible values; a median of 0 bounds nothing.

    Args:
        quantity: one of `QUANTITIES`.

    Raises:
        ValueError: another quantity.
    """
    if quantity not in QUANTITIES:
        raise ValueError(f"quantity must be one of {QUANTITIES}, got {quantity!r}.")
    with np.errstate(invalid="ignore"):
        wrong = np.abs(values) >= PLACEHOLDER
        if quantity == DEMAND:
            wrong |= values < 0
            rest = values[~wrong & ~np.isnan(values)]
            median = np.median(rest) if len(rest) else 0.0
            if median > 0:
                wrong |= values > TIMES_THE_MEDIAN * median
    return wrong


def is_no_demand(implausible_hours: int, hours: int) -> bool:
    """Whether a column called demand must be something else, see `MOST_IMPLAUSIBLE`."""
    return implausible_hours > max(24, MOST_IMPLAUSIBLE * hours)
