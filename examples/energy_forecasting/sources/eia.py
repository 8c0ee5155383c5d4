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

from examples.energy_forecasting.plausibility import ANY, DEMAND
from examples.energy_forecasting.series import HOUR, MOST_HOURS, HourlySeries
from examples.energy_forecasting.sources.http import (
    EmptyRangeError,
    PatientHttp,
    SourceError,
    WrongKeyError,
)
from examples.energy_forecasting.sources.replies import (
    LONGEST_QUOTE,
    finite_number,
    full_hour,
    hidden_in_errors,
    hide,
    shown,
    whole_number,
)

logger = logging.getLogger(__name__)

URL = "https://api.eia.gov/v2/electricity/rto"
KEY_VARIABLE = "EIA_API_KEY"
PAGE_ROWS = 5000
"""The most rows that the API gives in one reply."""

MOST_COLUMNS = 100
"""Fuels or sub-regions of a region; the EIA has fewer than 20."""


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
        return self._series("region-data", facets, start_date, end_date).screened(DEMAND)

    def get_generation_mix(self, region: str, start_date: str, end_date: str) -> HourlySeries:
        """Hourly net generation in MW, one column per fuel: generation_SUN, generation_NG, ..."""
        facets = {"respondent": check_code("region", region)}
        series = self._series("fuel-type-data", facets, start_date, end_date, "fueltype")
        return series.screened(ANY)

    def get_subregion_demand(self, region: str, start_date: str, end_date: str) -> HourlySeries:
        """Hourly demand in MW, one column per sub-region of a balancing authority."""
        facets = {"parent": check_code("region", region)}
        series = self._series("region-sub-ba-data", facets, start_date, end_date, "subba")
        return series.screened(DEMAND)

    def _series(
        self,
        route: str,
        facets: Mapping[str, str],
        start_date: str,
        end_date: str,
        kind: str | None = None,
    ) -> HourlySeries:
        """A column "demand", or one for each `kind` of row: demand_PGAE, generation_SUN.

        `kind`: the field of a row whose codes the columns are named by.
        """
        first, last = check_range(start_date, end_date)
        with hidden_in_errors(self._key):
            rows = self._rows(route, facets, first, last, kind)
        found: dict[tuple[str, np.datetime64], float] = {}
        source = " ".join(["EIA", route, *facets.values()])
        with hidden_in_errors(self._key):
            for row in rows:
                hour = full_hour(row.get("period"), f"a period of {source}", first, last)
                name = _column(row, kind, source)
                if "value" not in row:
                    raise SourceError(
                        f"{source}: rows must have a value, got columns {shown(', '.join(row))}."
                    )
                value = row["value"]
                is_missing = value is None or value == ""
                what = f"a value of {source} at {hour}"
                found[name, hour] = np.nan if is_missing else finite_number(value, what)
        if len(found) != len(rows):
            raise SourceError(
                f"EIA announced {len(rows)} rows of {route} and gave {len(rows)}, {len(found)} of "
                "them different; try again."
            )
        names = list(dict.fromkeys(name for name, _ in found))
        hours = sorted({hour for _, hour in found})
        columns = {
            name: np.array([found.get((name, hour), np.nan) for hour in hours]) for name in names
        }
        return HourlySeries.from_rows(hours, columns, source)

    def _rows(
        self,
        route: str,
        facets: Mapping[str, str],
        first: np.datetime64,
        last: np.datetime64,
        kind: str | None,
    ) -> list[dict[str, Any]]:
        """All pages, in a stable order, counted."""
        order = ["period", *facets, *([] if kind is None else [kind])]
        params = {"frequency": "hourly", "data[0]": "value", "start": str(first), "end": str(last)}
        params |= {f"facets[{name}][]": value for name, value in facets.items()}
        for n, column in enumerate(order):
            params |= {f"sort[{n}][column]": column, f"sort[{n}][direction]": "asc"}
        most = (int((last - first) / HOUR) + 1) * (1 if kind is None else MOST_COLUMNS)
        rows: list[dict[str, Any]] = []
        total: int | None = None
        pages = 0
        while total is None or len(rows) < total:
            paging = {"offset": str(len(rows)), "length": str(PAGE_ROWS)}
            page = self._page(f"{self._url}/{route}/data/", params | paging)
            # Twice what there can be: rows that come twice have an error of their own.
            announced = whole_number(page["total"], f"EIA's total of {route}", largest=2 * most)
            if total not in (None, announced):
                raise SourceError(
                    f"EIA announced {total} rows of {route}, then {announced}: the data changed "
                    "while it was read; try again."
                )
            total, pages = announced, pages + 1
            if not page["data"] and len(rows) < total:
                raise SourceError(f"EIA announced {total} rows of {route} but gave {len(rows)}.")
            rows += page["data"]
            if len(rows) > total:
                raise SourceError(f"EIA announced {total} rows of {route} but gave {len(rows)}.")
            if pages > 2 * (total // PAGE_ROWS) + 10:
                raise SourceError(
                    f"EIA gave {len(rows)} of {total} rows of {route} in {pages} pages; ask for a "
                    "shorter range."
                )
            logger.info("EIA %s: %d of %d rows", route, len(rows), total)
        if not rows:
            raise EmptyRangeError(
                f"EIA has no rows of {route} for {dict(facets)} from {first} to {last}; check the "
                "region's code and the dates (hourly data begins in 2015 or 2019)."
            )
        return rows

    def _page(self, url: str, params: Mapping[str, str]) -> dict[str, Any]:
        reply = self._http.get(url, params, {"X-Api-Key": self._key})
        if reply.status in (401, 403):
            raise WrongKeyError(
                f"EIA refuses the api_key (HTTP {reply.status}); check {KEY_VARIABLE}, or get "
                "a key at https://www.eia.gov/opendata/."
            )
        try:
            body = reply.json()
        except ValueError:
            body = None
        response = body.get("response") if isinstance(body, dict) else None
        if reply.status != 200 or not isinstance(response, dict):
            told = body.get("error", "no response") if isinstance(body, dict) else "no JSON object"
            # Hidden before it is cut: a part of the key must not remain.
            reason = hide(told if isinstance(told, str) else shown(told), self._key)
            raise SourceError(f"EIA answered HTTP {reply.status}: {reason[:LONGEST_QUOTE]}")
        missing = {"total", "data"} - set(response)
        if missing:
            raise SourceError(
                f"EIA's answer must have {sorted(missing)}, got {shown(', '.join(response))}."
            )
        data = response["data"]
        if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
            raise SourceError(f"EIA's data must be a list of rows, got {shown(data)}.")
        return response


def _column(row: Mapping[str, Any], kind: str | None, source: str) -> str:
    """The column of a row."""
    if kind is None:
        return "demand"
    code = row.get(kind)
    if not isinstance(code, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,16}", code):
        raise SourceError(f"{source}: {kind} must be a code such as 'SUN', got {shown(code)}.")
    return f"{'generation' if kind == 'fueltype' else 'demand'}_{code}"


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
    if last - first >= MOST_HOURS * HOUR:
        raise ValueError(
            f"a range must be shorter than {MOST_HOURS:,} hours, got {start_date} to {end_date}."
        )
    return first, last
