"""A real HTTP server on this machine that answers like EIA and OASIS do, faults included.

The replies have the recorded form: EIA's `total` and `value` are strings, a page has at most 5,000
rows, `end` is inclusive; OASIS answers with a ZIP, also for errors.
"""

import io
import json
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np

Query = dict[str, str]
KEY = "k3y-that-nobody-may-see"


@dataclass
class Reply:
    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


Answer = Callable[[Query, dict[str, str]], Reply]


@dataclass
class Served:
    """Where the server is, and what it was asked."""

    url: str
    queries: list[Query] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)  # the raw request lines


@contextmanager
def serving(answer: Answer) -> Iterator[Served]:
    """A server that lives as long as the block."""
    served = Served("")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = {
                name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()
            }
            served.queries.append(query)
            served.targets.append(self.path)
            reply = answer(query, dict(self.headers))
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            self.wfile.write(reply.body)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def as_json(body: Any, status: int = 200, **headers: str) -> Reply:
    return Reply(json.dumps(body).encode(), status, {"Content-Type": "application/json", **headers})


def eia(values: dict[str, str | None], **extra: str) -> Answer:
    """EIA's region-data with these values by period, in a real key's care."""

    def answer(query: Query, headers: dict[str, str]) -> Reply:
        if headers.get("X-Api-Key") != KEY:
            error = {"code": "API_KEY_INVALID", "message": "An invalid api_key was supplied."}
            return as_json({"error": error}, 403)
        periods = [p for p in sorted(values) if query["start"] <= p <= query["end"]]
        offset, length = int(query["offset"]), min(5000, int(query["length"]))
        rows = [
            {
                "period": period,
                "respondent": query.get("facets[respondent][]", ""),
                "respondent-name": "United States Lower 48",
                "type": "D",
                "type-name": "Demand",
                "value": values[period],
                "value-units": "megawatthours",
                **extra,
            }
            for period in periods[offset : offset + length]
        ]
        response = {
            "total": str(len(periods)),
            "dateFormat": 'YYYY-MM-DD"T"HH24',
            "frequency": "hourly",
            "data": rows,
        }
        return as_json({"response": response, "request": {}, "apiVersion": "2.1.8"})

    return answer


def hours(start: str, count: int) -> list[str]:
    """Periods as EIA writes them."""
    return [str(np.datetime64(start, "h") + n) for n in range(count)]


def oasis_zip(text: str, name: str = "SLD_FCST_ACTUAL.csv") -> Reply:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, text)
    return Reply(buffer.getvalue(), 200, {"Content-Type": "application/x-zip-compressed"})


def oasis_error(code: str, text: str) -> Reply:
    """An error document behind HTTP 200, as OASIS sends it."""
    document = (
        '<?xml version="1.0" encoding="UTF-8"?>'
        '<m:OASISReport xmlns:m="http://www.caiso.com/soa/OASISReport_v1.xsd"><m:MessagePayload>'
        f"<m:RTO><m:name>CAISO</m:name><m:ERROR><m:ERR_CODE>{code}</m:ERR_CODE>"
        f"<m:ERR_DESC>{text}</m:ERR_DESC></m:ERROR></m:RTO></m:MessagePayload></m:OASISReport>"
    )
    return oasis_zip(document, "INVALID_REQUEST.xml")


def oasis(areas: tuple[str, ...] = ("CA ISO-TAC", "PGE-TAC")) -> Answer:
    """OASIS's SLD_FCST: MW is the hour of the day, 1000 more for the whole area."""

    def answer(query: Query, headers: dict[str, str]) -> Reply:
        first, last = (oasis_hour(query[name]) for name in ("startdatetime", "enddatetime"))
        if (last - first) > np.timedelta64(31 * 24, "h"):
            return oasis_error("1004", "Date range exceeds 31 days")
        lines = [
            "INTERVALSTARTTIME_GMT,INTERVALENDTIME_GMT,LOAD_TYPE,OPR_DT,OPR_HR,OPR_INTERVAL,"
            "MARKET_RUN_ID,TAC_AREA_NAME,LABEL,XML_DATA_ITEM,POS,MW,EXECUTION_TYPE,GROUP"
        ]
        for n in range(int((last - first) / np.timedelta64(1, "h"))):
            for area in areas:
                hour = first + n
                mw = int(str(hour)[-2:]) + 1000 * (area == "CA ISO-TAC")
                lines.append(
                    f"{hour}:00:00-00:00,{hour + 1}:00:00-00:00,0,{str(hour)[:10]},1,0,ACTUAL,"
                    f"{area},Total Actual Hourly Integrated Load,SYS_FCST_ACT_MW,3.8,{mw},ACTUAL,1"
                )
        return oasis_zip("\n".join(lines) + "\n")

    return answer


def oasis_hour(text: str) -> np.datetime64:
    """20240131T08:00-0000."""
    return np.datetime64(f"{text[:4]}-{text[4:6]}-{text[6:8]}T{text[9:11]}", "h")
