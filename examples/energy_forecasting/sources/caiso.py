"""California ISO, OASIS: hourly demand by area, and day-ahead prices. No key.

OASIS answers with a ZIP. An error comes in the ZIP too, behind HTTP 200; more than 31 days are
refused, and more than one call in 5 seconds is answered with 429.
"""

from __future__ import annotations

import csv
import io
import logging
import zipfile
from collections.abc import Iterator, Mapping
from xml.etree import ElementTree

import numpy as np

from examples.energy_forecasting.series import HOUR, HourlySeries
from examples.energy_forecasting.sources.eia import check_range
from examples.energy_forecasting.sources.http import EmptyRangeError, PatientHttp, SourceError

logger = logging.getLogger(__name__)

URL = "https://oasis.caiso.com/oasisapi/SingleZip"
WINDOW_HOURS = 31 * 24
SPACING_SECONDS = 5.0
WHOLE_AREA = "CA ISO-TAC"
NORTHERN_HUB = "TH_NP15_GEN-APND"


class CAISOClient:
    """A thin client of OASIS.

    Args:
        url: of SingleZip, if it is not CAISO's own.
        http: how to ask; 5 s apart by default.
    """

    def __init__(self, *, url: str | None = None, http: PatientHttp | None = None) -> None:
        self._url = url or URL
        self._http = http or PatientHttp(
            spacing_seconds=SPACING_SECONDS, backoff_seconds=SPACING_SECONDS
        )

    def get_electricity_demand(
        self, start_date: str, end_date: str, area: str = WHOLE_AREA
    ) -> HourlySeries:
        """Hourly demand of an area in MW (SLD_FCST, ACTUAL).

        Args:
            start_date: UTC date or hour, the first that is wanted.
            end_date: the first that is not.
            area: TAC_AREA_NAME: "CA ISO-TAC" for all, "PGE-TAC", "SCE-TAC", "SDGE-TAC", ...

        Raises:
            EmptyRangeError: no rows of that area in the range; the areas found are named.
            SourceError: an error document, another file than announced, or no answer.
        """
        query = {"queryname": "SLD_FCST", "market_run_id": "ACTUAL", "version": "1"}
        return self._fetch(query, "TAC_AREA_NAME", area, "MW", "demand", start_date, end_date)

    def get_price(self, start_date: str, end_date: str, node: str = NORTHERN_HUB) -> HourlySeries:
        """Hourly day-ahead price of a node in $/MWh (PRC_LMP)."""
        query = {"queryname": "PRC_LMP", "market_run_id": "DAM", "version": "12", "node": node}
        return self._fetch(query, "LMP_TYPE", "LMP", "MW", "price", start_date, end_date)

    def _fetch(
        self,
        query: Mapping[str, str],
        key: str,
        wanted: str,
        value: str,
        column: str,
        start_date: str,
        end_date: str,
    ) -> HourlySeries:
        name = query["queryname"]
        times, values, others = [], [], set()
        for first, last in windows(start_date, end_date):
            params = {
                **query,
                "resultformat": "6",
                "startdatetime": _oasis_time(first),
                "enddatetime": _oasis_time(last),
            }
            for row in self._rows(name, params):
                missing = {"INTERVALSTARTTIME_GMT", key, value} - set(row)
                if missing:
                    raise SourceError(
                        f"OASIS {name} must have {sorted(missing)}, got {sorted(row)}."
                    )
                if row[key] != wanted:
                    others.add(row[key])
                    continue
                times.append(np.datetime64(row["INTERVALSTARTTIME_GMT"][:19], "h"))
                values.append(float(row[value]) if row[value] else np.nan)
            logger.info("OASIS %s: %d rows until %s", name, len(times), last)
        if not times:
            raise EmptyRangeError(
                f"OASIS {name} has no rows of {key}={wanted!r} from {start_date} to {end_date}; it "
                f"has {sorted(others) or 'none at all'}."
            )
        source = f"CAISO OASIS {name} {wanted}"
        return HourlySeries.from_rows(times, {column: np.array(values)}, source)

    def _rows(self, name: str, params: Mapping[str, str]) -> list[dict[str, str]]:
        reply = self._http.get(self._url, params)
        if reply.status_code != 200:
            raise SourceError(f"OASIS answered {name} with HTTP {reply.status_code}.")
        try:
            archive = zipfile.ZipFile(io.BytesIO(reply.content))
        except zipfile.BadZipFile:
            kind = reply.headers.get("Content-Type", "nothing")
            raise SourceError(f"OASIS must answer {name} with a ZIP, got {kind}.") from None
        rows: list[dict[str, str]] = []
        for member in archive.namelist():
            data = archive.read(member)
            if member.lower().endswith(".xml"):
                code, text = _error_of(data)
                if code == "1000":  # "No data returned for the specified selection"
                    continue
                raise SourceError(f"OASIS refuses {name}: {code} {text}")
            rows += csv.DictReader(io.StringIO(data.decode("utf-8-sig")))
        return rows


def windows(start_date: str, end_date: str) -> Iterator[tuple[np.datetime64, np.datetime64]]:
    """The range in pieces that OASIS takes; ends are exclusive."""
    first, last = check_range(start_date, end_date)
    stop = last + HOUR
    while first < stop:
        end = min(stop, first + WINDOW_HOURS * HOUR)
        yield first, end
        first = end


def _oasis_time(hour: np.datetime64) -> str:
    return f"{hour}".replace("-", "") + ":00-0000"


def _error_of(document: bytes) -> tuple[str, str]:
    """Code and text of an error document."""
    try:
        root = ElementTree.fromstring(document)
    except ElementTree.ParseError:
        return "?", "an XML document that cannot be read"
    found = {
        element.tag.rpartition("}")[2]: (element.text or "").strip() for element in root.iter()
    }
    return found.get("ERR_CODE", "?"), found.get("ERR_DESC", "no description")
