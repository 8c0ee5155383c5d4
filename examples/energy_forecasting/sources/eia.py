"""U.S. Energy Information Administration, API v2: hourly demand, generation, sub-regions.

Needs a key, free at https://www.eia.gov/opendata/. It travels in a header, never in a URL.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from examples.energy_forecasting.series import HOUR, HourlySeries
from examples.energy_forecasting.sources.http import (
    EmptyRangeError,
    PatientHttp,
    SourceError,
    WrongKeyError,
)

logger = logging.getLogger(__name__)

URL = "https://api.eia.gov/v2/electricity/rto"
KEY_VARIABLE = "EIA_API_KEY"
PAGE_ROWS = 5000
"""The most rows that the API gives in one reply."""


class EIAClient:
    """A thin client for hourly electricity data.

    Args:
        api_key: None takes the environment's EIA_API_KEY.
        url: of the API, if it is not the EIA's own.
        http: how to ask.

    Raises:
        WrongKeyError: no key.
    """

    def __init__(
        self,
        api_key: str | None = None,
        *,
        url: str | None = None,
        http: PatientHttp | None = None,
    ) -> None:
        key = api_key or os.environ.get(KEY_VARIABLE, "")
        if not key.strip():
            raise WrongKeyError(
                f"api_key must be given, or {KEY_VARIABLE} set; keys are free at "
                "https://www.eia.gov/opendata/."
            )
        if not re.fullmatch(r"[!-~]+", key.strip()):
            raise WrongKeyError(
                f"api_key must be one word of ASCII characters, got {len(key)} characters with "
                "others among them; copy it again from the EIA's mail."
            )
        self._key, self._url, self._http = key.strip(), url or URL, http or PatientHttp()

    def __repr__(self) -> str:
        return f"EIAClient(api_key='***', url={self._url!r})"

    def get_electricity_demand(self, region: str, start_date: str, end_date: str) -> HourlySeries:
        """Hourly demand of a region in MW.

        Args:
            region: balancing authority or total, for example "US48", "CISO", "PJM".
            start_date: "2020-01-01" or "2020-01-01T05", UTC, the first hour.
            end_date: the same; the first hour that is not wanted.

        Raises:
            WrongKeyError: the API refuses the key.
            EmptyRangeError: it has no rows in the range.
            SourceError: it gives something else than it announces, or no answer.
            ValueError: a wrong region or range.
        """
        facets = {"respondent": check_code("region", region), "type": "D"}
        rows = self._rows("region-data", facets, start_date, end_date)
        return _series(rows, lambda row: "demand", f"EIA region-data {region} D")

    def get_generation_mix(self, region: str, start_date: str, end_date: str) -> HourlySeries:
        """Hourly net generation in MW, one column per fuel: generation_SUN, generation_NG, ..."""
        facets = {"respondent": check_code("region", region)}
        rows = self._rows("fuel-type-data", facets, start_date, end_date, "fueltype")
        name = "generation_{fueltype}".format_map
        return _series(rows, name, f"EIA fuel-type-data {region}")

    def get_subregion_demand(self, region: str, start_date: str, end_date: str) -> HourlySeries:
        """Hourly demand in MW, one column per sub-region of a balancing authority."""
        facets = {"parent": check_code("region", region)}
        rows = self._rows("region-sub-ba-data", facets, start_date, end_date, "subba")
        return _series(rows, "demand_{subba}".format_map, f"EIA region-sub-ba-data {region}")

    def _rows(
        self,
        route: str,
        facets: Mapping[str, str],
        start_date: str,
        end_date: str,
        *more_keys: str,
    ) -> list[dict[str, Any]]:
        """All pages, in a stable order, counted."""
        first, last = check_range(start_date, end_date)
        order = ["period", *facets, *more_keys]
        params = {"frequency": "hourly", "data[0]": "value", "start": str(first), "end": str(last)}
        params |= {f"facets[{name}][]": value for name, value in facets.items()}
        for n, column in enumerate(order):
            params |= {f"sort[{n}][column]": column, f"sort[{n}][direction]": "asc"}
        rows: list[dict[str, Any]] = []
        total: int | None = None
        while total is None or len(rows) < total:
            paging = {"offset": str(len(rows)), "length": str(PAGE_ROWS)}
            page = self._page(f"{self._url}/{route}/data/", params | paging)
            announced = int(page["total"])
            if total not in (None, announced):
                raise SourceError(
                    f"EIA announced {total} rows of {route}, then {announced}: the data changed "
                    "while it was read; try again."
                )
            total = announced
            if not page["data"] and len(rows) < total:
                raise SourceError(f"EIA announced {total} rows of {route} but gave {len(rows)}.")
            rows += page["data"]
            logger.info("EIA %s: %d of %d rows", route, len(rows), total)
        if not rows:
            raise EmptyRangeError(
                f"EIA has no rows of {route} for {dict(facets)} from {first} to {last}; check the "
                "region's code and the dates (hourly data begins in 2015 or 2019)."
            )
        keys = [tuple(row.get(name) for name in order) for row in rows]
        if len(rows) != total or len(set(keys)) != len(keys):
            raise SourceError(
                f"EIA announced {total} rows of {route} and gave {len(rows)}, {len(set(keys))} of "
                "them different; try again."
            )
        return rows

    def _page(self, url: str, params: Mapping[str, str]) -> dict[str, Any]:
        reply = self._http.get(url, params, {"X-Api-Key": self._key})
        if reply.status_code in (401, 403):
            raise WrongKeyError(
                f"EIA refuses the api_key (HTTP {reply.status_code}); check {KEY_VARIABLE}, or get "
                "a key at https://www.eia.gov/opendata/."
            )
        try:
            body = reply.json()
        except ValueError:
            body = {}
        if reply.status_code != 200 or "response" not in body:
            reason = str(body.get("error", "no JSON"))[:200].replace(self._key, "***")
            raise SourceError(f"EIA answered HTTP {reply.status_code}: {reason}")
        response: dict[str, Any] = body["response"]
        missing = {"total", "data"} - set(response)
        if missing:
            raise SourceError(f"EIA's answer must have {sorted(missing)}, got {sorted(response)}.")
        return response


def check_code(name: str, code: str) -> str:
    """An EIA code such as US48."""
    if not isinstance(code, str) or not re.fullmatch(r"[A-Z0-9-]{2,8}", code):
        raise ValueError(f"{name} must be a code such as 'US48' or 'CISO', got {code!r}.")
    return code


def check_range(start_date: str, end_date: str) -> tuple[np.datetime64, np.datetime64]:
    """First and last hour of a range whose end is exclusive."""
    hours = []
    for name, text in (("start_date", start_date), ("end_date", end_date)):
        try:
            hours.append(np.datetime64(text, "h"))
            if np.isnat(hours[-1]):
                raise ValueError
        except ValueError:
            raise ValueError(
                f"{name} must be a UTC date or hour such as '2024-01-31' or '2024-01-31T05', got "
                f"{text!r}."
            ) from None
    first, last = hours[0], hours[1] - HOUR
    if first > last:
        raise ValueError(f"start_date must be before end_date, got {start_date} and {end_date}.")
    return first, last


def _series(rows: list[dict[str, Any]], name_of: Any, source: str) -> HourlySeries:
    periods = sorted({row["period"] for row in rows})
    index = {period: n for n, period in enumerate(periods)}
    columns: dict[str, np.ndarray] = {}
    for row in rows:
        column = columns.setdefault(name_of(row), np.full(len(periods), np.nan))
        value = row.get("value", "absent")
        if value == "absent":
            raise SourceError(f"{source}: rows must have a value, got columns {sorted(row)}.")
        column[index[row["period"]]] = np.nan if value in (None, "") else float(value)
    times = np.array(periods, dtype="datetime64[h]")
    return HourlySeries.from_rows(times, columns, source)
