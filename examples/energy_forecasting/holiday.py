"""Public holidays, on which people use power as on a Sunday; from the package `holidays`."""

from __future__ import annotations

from typing import Any

import numpy as np


def holiday_days(days: np.ndarray, country: str) -> np.ndarray:
    """Which of these local days are public holidays: bool, as `days`.

    Args:
        days: datetime64[D].
        country: ISO code such as "US", or with a subdivision, "US-CA"; "" is none.

    Raises:
        ModuleNotFoundError: the package holidays is not installed.
        ValueError: it does not know the country.
    """
    if not country:
        return np.zeros(days.shape, dtype=bool)
    years = sorted(
        {int(year) + 1970 for year in np.unique(days.astype("datetime64[Y]").astype(int))}
    )
    found = np.array(sorted(_calendar(country, years)), dtype="datetime64[D]")
    return np.isin(days, found)


def _calendar(country: str, years: list[int]) -> Any:
    try:
        import holidays
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the package holidays must be installed: pip install holidays, or --holidays ''",
            name=error.name,
        ) from None
    code, _, subdivision = country.partition("-")
    try:
        return holidays.country_holidays(code, subdiv=subdivision or None, years=years)
    except NotImplementedError:
        raise ValueError(
            f"--holidays must be a country such as 'US' or 'US-CA', got {country!r}; '' is none."
        ) from None
