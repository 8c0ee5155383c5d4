"""The clients against a real HTTP server that answers in the recorded form, faults included."""

import logging

import numpy as np
import pytest

from examples.energy_forecasting.sources.caiso import CAISOClient, windows
from examples.energy_forecasting.sources.eia import EIAClient
from examples.energy_forecasting.sources.http import (
    EmptyRangeError,
    PatientHttp,
    SourceError,
    WrongKeyError,
)
from tests.energy_forecasting.server import (
    KEY,
    Reply,
    as_json,
    eia,
    hours,
    oasis,
    oasis_error,
    oasis_zip,
    serving,
)


def patient(pauses: list[float] | None = None, **options) -> PatientHttp:
    return PatientHttp(sleep=(pauses if pauses is not None else []).append, **options)


def ask_eia(served, start="2024-01-01", end="2024-01-08", key=KEY, **options):
    client = EIAClient(api_key=key, url=served.url, http=patient(**options))
    return client.get_electricity_demand("US48", start, end)


def sometimes(replies: list[Reply], answer):
    """These replies first, then `answer`'s."""
    left = list(replies)
    return lambda query, headers: left.pop(0) if left else answer(query, headers)


VALUES = {period: str(1000 + n) for n, period in enumerate(hours("2024-01-01", 7 * 24))}


def test_eia_strings_become_numbers_and_nulls_missing():
    with serving(eia(VALUES | {"2024-01-02T03": None})) as served:
        series = ask_eia(served)
    assert len(series) == 168 and str(series.start) == "2024-01-01T00"
    assert np.isnan(series.target[27]) and series.target[28] == 1028.0
    assert series.quality.missing_values == 1
    (query,) = served.queries
    assert query["facets[respondent][]"] == "US48" and query["facets[type][]"] == "D"
    assert (query["start"], query["end"]) == (
        "2024-01-01T00",
        "2024-01-07T23",
    )  # EIA's is inclusive
    assert query["sort[0][column]"] == "period"


def test_eia_pages_are_put_together_and_counted():
    periods = hours("2020-01-01", 4 * 8766)
    with serving(eia({period: str(n) for n, period in enumerate(periods)})) as served:
        series = ask_eia(served, "2020-01-01", "2024-01-01")
    assert len(series) == 35_064  # not 35,040: 2020 is a leap year
    assert np.array_equal(series.target, np.arange(35_064))
    assert [query["offset"] for query in served.queries] == [str(5000 * n) for n in range(8)]


def test_eia_key_is_never_in_a_url_a_log_or_an_error(caplog):
    caplog.set_level(logging.DEBUG)
    busy = Reply(b"slow down " + KEY.encode(), 429)
    wrong = as_json({"error": f"bad column for {KEY}"}, 400)
    with serving(sometimes([busy, wrong], eia(VALUES))) as served:
        client = EIAClient(api_key=KEY, url=served.url, http=patient())
        with pytest.raises(SourceError, match=r"HTTP 400: bad column for \*\*\*") as failure:
            client.get_electricity_demand("US48", "2024-01-01", "2024-01-02")
    assert KEY not in caplog.text and KEY not in repr(client) and KEY not in str(failure.value)
    assert all(KEY not in target for target in served.targets)
    assert "try 1 of 5" in caplog.text


def test_eia_wrong_key_is_told_apart():
    with serving(eia(VALUES)) as served, pytest.raises(WrongKeyError, match="refuses the api_key"):
        ask_eia(served, key="wrong")
    assert len(served.queries) == 1  # no retry


def test_eia_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("EIA_API_KEY", KEY)
    with serving(eia(VALUES)) as served:
        assert len(ask_eia(served, key=None)) == 168
    monkeypatch.delenv("EIA_API_KEY")
    with pytest.raises(WrongKeyError, match="api_key must be given, or EIA_API_KEY set"):
        EIAClient()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_servers_are_asked_again_later(status):
    pauses: list[float] = []
    replies = [Reply(b"", status, {"Retry-After": "7"}), Reply(b"", status)]
    with serving(sometimes(replies, eia(VALUES))) as served:
        assert len(ask_eia(served, pauses=pauses)) == 168
    assert pauses == [7.0, 2.0]  # as told, then the second step of the back-off


def test_retries_end():
    message = r"no answer in 3 tries, last: HTTP 503"
    with serving(lambda q, h: Reply(b"", 503)) as served, pytest.raises(SourceError, match=message):
        ask_eia(served, retries=2)
    assert len(served.queries) == 3


def test_no_server_is_an_error_without_a_url():
    with serving(eia(VALUES)) as served:
        pass
    with pytest.raises(
        SourceError, match=r"127.0.0.1 gave no answer .* ConnectionError"
    ) as failure:
        ask_eia(served, retries=1)
    assert "http://" not in str(failure.value)


def test_redirects_to_other_hosts_are_refused():
    away = Reply(b"", 302, {"Location": "http://localhost:9/elsewhere"})
    answer, message = sometimes([away], eia(VALUES)), "redirects to another host"
    with serving(answer) as served, pytest.raises(SourceError, match=message):
        ask_eia(served)


def test_eia_empty_range():
    with (
        serving(eia(VALUES)) as served,
        pytest.raises(EmptyRangeError, match="no rows of region-data"),
    ):
        ask_eia(served, "2030-01-01", "2030-01-02")


def cut(change):
    """EIA with a fault in the response."""

    def answer(query, headers):
        import json

        body = json.loads(eia(VALUES)(query, headers).body)
        change(body["response"], query)
        return as_json(body)

    return answer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, q: r.update(total="200"), "announced 200 rows of region-data but gave 168"),
        (lambda r, q: r["data"].append(r["data"][0]) or r.update(total="169"), "168 of them diff"),
        (lambda r, q: r.pop("total"), r"must have \['total'\]"),
        (lambda r, q: [row.pop("value") for row in r["data"]], "rows must have a value"),
        (
            lambda r, q: r.update(total="300" if q["offset"] == "0" else "301"),
            "announced 300 rows of region-data, then 301",
        ),
    ],
)
def test_eia_that_gives_something_else_than_it_announces(change, message):
    with serving(cut(change)) as served, pytest.raises(SourceError, match=message):
        ask_eia(served)


def test_eia_gaps_are_kept_and_counted():
    values = {period: value for period, value in VALUES.items() if period != "2024-01-03T05"}
    with serving(eia(values)) as served:
        series = ask_eia(served)
    assert len(series) == 168 and series.quality.gap_hours == 1
    assert np.isnan(series.target[53])


def test_eia_generation_has_a_column_per_fuel():
    def answer(query, headers):
        rows = [
            {"period": period, "respondent": "CISO", "fueltype": fuel, "value": str(n)}
            for period in hours("2024-01-01", 2)
            for n, fuel in enumerate(("SUN", "NG"))
        ]
        return as_json({"response": {"total": str(len(rows)), "data": rows}})

    with serving(answer) as served:
        client = EIAClient(KEY, url=served.url, http=patient())
        series = client.get_generation_mix("CISO", "2024-01-01", "2024-01-02")
    assert list(series.columns) == ["generation_SUN", "generation_NG"]
    assert series.columns["generation_NG"].tolist() == [1.0, 1.0]
    assert "fuel-type-data" in served.targets[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("us 48", "2024-01-01", "2024-01-02"), "region must be a code"),
        (("US48", "yesterday", "2024-01-02"), "start_date must be a UTC date or hour"),
        (("US48", "2024-01-02", "2024-01-02"), "start_date must be before end_date"),
    ],
)
def test_wrong_questions_are_not_asked(arguments, message):
    with serving(eia(VALUES)) as served:
        client = EIAClient(KEY, url=served.url, http=patient())
        with pytest.raises(ValueError, match=message):
            client.get_electricity_demand(*arguments)
    assert not served.queries


def caiso(served, pauses=None) -> CAISOClient:
    return CAISOClient(url=served.url, http=patient(pauses, spacing_seconds=0, backoff_seconds=5))


def test_caiso_asks_for_31_days_at_a_time():
    with serving(oasis()) as served:
        series = caiso(served).get_electricity_demand("2024-01-01", "2024-04-01")
    assert len(series) == 91 * 24 and series.quality.gap_hours == 0
    assert series.target[:3].tolist() == [1000.0, 1001.0, 1002.0]
    asked = [(query["startdatetime"], query["enddatetime"]) for query in served.queries]
    assert asked == [
        ("20240101T00:00-0000", "20240201T00:00-0000"),
        ("20240201T00:00-0000", "20240303T00:00-0000"),
        ("20240303T00:00-0000", "20240401T00:00-0000"),
    ]
    assert {query["queryname"] for query in served.queries} == {"SLD_FCST"}


def test_caiso_areas():
    with serving(oasis()) as served:
        series = caiso(served).get_electricity_demand("2024-01-01", "2024-01-02", "PGE-TAC")
        assert series.target.tolist() == list(range(24))
        with pytest.raises(EmptyRangeError, match=r"'XYZ' .* it has \['CA ISO-TAC', 'PGE-TAC'\]"):
            caiso(served).get_electricity_demand("2024-01-01", "2024-01-02", "XYZ")


def test_caiso_error_document_behind_http_200():
    answer = lambda query, headers: oasis_error("1001", "Invalid Query Name")  # noqa: E731
    with serving(answer) as served, pytest.raises(SourceError, match="1001 Invalid Query Name"):
        caiso(served).get_electricity_demand("2024-01-01", "2024-01-02")


def test_caiso_no_data_is_an_empty_range():
    answer = lambda query, headers: oasis_error("1000", "No data returned")  # noqa: E731
    with serving(answer) as served, pytest.raises(EmptyRangeError, match="it has none at all"):
        caiso(served).get_electricity_demand("2024-01-01", "2024-01-02")


def test_caiso_waits_when_told():
    pauses: list[float] = []
    busy = Reply(
        b"<html>Acceptable Use Policy Violation. Please retry your request after 5 seconds</html>",
        429,
        {"Content-Type": "text/html"},
    )
    with serving(sometimes([busy], oasis())) as served:
        assert len(caiso(served, pauses).get_electricity_demand("2024-01-01", "2024-01-02")) == 24
    assert pauses == [5.0]


def test_caiso_calls_are_5_seconds_apart():
    pauses: list[float] = []
    with serving(oasis()) as served:
        client = CAISOClient(url=served.url, http=patient(pauses, spacing_seconds=5))
        client.get_electricity_demand("2024-01-01", "2024-02-15")
    (pause,) = pauses
    assert 4 < pause <= 5
    assert CAISOClient()._http.spacing_seconds == 5


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(b"<html>", 200, {"Content-Type": "text/html"}), "with a ZIP, got text/html"),
        (oasis_zip("INTERVALSTARTTIME_GMT,TAC_AREA_NAME\n2024-01-01T00:00,x\n"), r"\['MW'\]"),
        (Reply(b"", 404), "HTTP 404"),
    ],
)
def test_caiso_that_sends_something_else(reply, message):
    with serving(lambda query, headers: reply) as served, pytest.raises(SourceError, match=message):
        caiso(served).get_electricity_demand("2024-01-01", "2024-01-02")


def test_caiso_price():
    text = (
        "INTERVALSTARTTIME_GMT,LMP_TYPE,MW\n"
        "2024-01-01T08:00:00-00:00,LMP,41.5\n2024-01-01T08:00:00-00:00,MCC,0.5\n"
        "2024-01-01T09:00:00-00:00,LMP,39\n"
    )
    with serving(lambda query, headers: oasis_zip(text)) as served:
        series = caiso(served).get_price("2024-01-01", "2024-01-02")
    assert series.columns["price"].tolist() == [41.5, 39.0]


def test_windows_cover_the_range_once():
    pieces = list(windows("2024-02-01", "2024-03-15T05"))
    assert [str(edge) for piece in pieces for edge in piece] == [
        "2024-02-01T00",
        "2024-03-03T00",
        "2024-03-03T00",
        "2024-03-15T05",
    ]
