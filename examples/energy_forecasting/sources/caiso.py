"""California ISO, OASIS: hourly demand by area, and day-ahead prices. No key.

OASIS answers with a ZIP. An error comes in the ZIP too, behind HTTP 200; more than 31 days are
refused, and more than one call in 5 seconds is answered with 429.
"""

from __future__ import annotations

import csv
import io
import logging
import lzma
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any
from xml.etree import ElementTree

import numpy as np

from examples.energy_forecasting.plausibility import ANY, DEMAND
from examples.energy_forecasting.series import HOUR, HourlySeries
from examples.energy_forecasting.sources.eia import check_range
from examples.energy_forecasting.sources.http import EmptyRangeError, PatientHttp, SourceError
from examples.energy_forecasting.sources.replies import finite_number, full_hour, shown

logger = logging.getLogger(__name__)

URL = "https://oasis.caiso.com/oasisapi/SingleZip"
WINDOW_HOURS = 31 * 24
SPACING_SECONDS = 5.0
WHOLE_AREA = "CA ISO-TAC"
NORTHERN_HUB = "TH_NP15_GEN-APND"
LARGEST_ARCHIVE = 64 << 20
"""Bytes of all members of a ZIP, unpacked; a month of all areas has about 5 MB."""

MOST_MEMBERS = 16
BROKEN = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError),
    RuntimeError,  # encrypted, or packed by a method that zipfile does not know
)
"""What reading a ZIP may raise."""

DAY = 24 * HOUR
"""OASIS may give the whole trading days that hold the hours it was asked for."""


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
        series = self._fetch(query, "TAC_AREA_NAME", area, "MW", "demand", start_date, end_date)
        return series.screened(DEMAND)

    def get_price(self, start_date: str, end_date: str, node: str = NORTHERN_HUB) -> HourlySeries:
        """Hourly day-ahead price of a node in $/MWh (PRC_LMP)."""
        query = {"queryname": "PRC_LMP", "market_run_id": "DAM", "version": "12", "node": node}
        series = self._fetch(query, "LMP_TYPE", "LMP", "MW", "price", start_date, end_date)
        return series.screened(ANY)

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
        times: list[np.datetime64] = []
        values: list[float] = []
        others: set[str] = set()
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
                    got = shown(", ".join(map(str, row)))
                    raise SourceError(f"OASIS {name} must have {sorted(missing)}, got {got}.")
                if row[key] != wanted:
                    others.add(shown(row[key]))
                    continue
                what = f"INTERVALSTARTTIME_GMT of OASIS {name}"
                hour = full_hour(row["INTERVALSTARTTIME_GMT"], what, first - DAY, last + DAY)
                times.append(hour)
                text = row[value]
                what = f"{value} of OASIS {name} at {hour}"
                values.append(finite_number(text, what) if text else np.nan)
            logger.info("OASIS %s: %d rows until %s", name, len(times), last)
        if not times:
            found = f"[{', '.join(sorted(others)[:20])}]" if others else "none at all"
            raise EmptyRangeError(
                f"OASIS {name} has no rows of {key}={wanted!r} from {start_date} to {end_date}; it "
                f"has {found}."
            )
        source = f"CAISO OASIS {name} {wanted}"
        return HourlySeries.from_rows(times, {column: np.array(values)}, source)

    def _rows(self, name: str, params: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        """The rows of all tables in the reply; none where OASIS says that there is no data."""
        reply = self._http.get(self._url, params)
        if reply.status != 200:
            raise SourceError(f"OASIS answered {name} with HTTP {reply.status}.")
        for member, data in _members(name, reply.body, reply.content_type):
            if member.lower().endswith(".xml"):
                code, text = _error_of(data)
                if code == "1000":  # "No data returned for the specified selection"
                    continue
                raise SourceError(f"OASIS refuses {name}: {code[:20]} {shown(text)[1:-1]}")
            try:
                yield from csv.DictReader(io.StringIO(data.decode("utf-8-sig")))
            except (UnicodeDecodeError, csv.Error) as error:
                raise SourceError(
                    f"OASIS must answer {name} with a table in UTF-8, got one that cannot be read "
                    f"({error})."
                ) from None


def _members(name: str, archive: bytes, content_type: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a ZIP's members, of at most `LARGEST_ARCHIVE` bytes in all.

    What a ZIP says of its own sizes is not believed: members are read up to the bound.
    """
    left = LARGEST_ARCHIVE
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            members = opened.infolist()
            if len(members) > MOST_MEMBERS:
                raise SourceError(
                    f"OASIS must answer {name} with at most {MOST_MEMBERS} files in a ZIP, got "
                    f"{len(members)}."
                )
            for member in members:
                with opened.open(member) as file:
                    data = file.read(left + 1)
                left -= len(data)
                if left < 0:
                    raise SourceError(
                        f"OASIS answers {name} with a ZIP of more than {LARGEST_ARCHIVE:,} bytes "
                        "when unpacked; ask for a shorter range."
                    )
                yield member.filename, data
    except BROKEN as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(
            f"OASIS must answer {name} with a ZIP, got {shown(content_type)[1:-1]}, which is none "
            f"that can be read ({type(error).__name__})."
        ) from None


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
    except (ElementTree.ParseError, ValueError, LookupError):  # broken, or an unknown encoding
        return "?", "an XML document that cannot be read"
    found = {
        element.tag.rpartition("}")[2]: (element.text or "").strip() for element in root.iter()
    }
    return found.get("ERR_CODE", "?"), found.get("ERR_DESC", "no description")
