"""What comes through the doors: keys stay where they belong, replies may hold and last anything."""

import base64
import io
import logging
import re
import socket
import threading
import traceback
import zipfile

import numpy as np
import pytest
from click.testing import CliRunner

from examples.energy_forecasting import cli
from examples.energy_forecasting.series import HourlySeries
from examples.energy_forecasting.sources import caiso as caiso_source
from examples.energy_forecasting.sources.caiso import CAISOClient
from examples.energy_forecasting.sources.csv_file import read_columns, read_csv
from examples.energy_forecasting.sources.eia import EIAClient
from examples.energy_forecasting.sources.http import PatientHttp, SourceError
from examples.energy_forecasting.sources.replies import hide
from tests.energy_forecasting.server import KEY, Reply, as_json, eia, hours, oasis_zip, serving
from tests.energy_forecasting.test_clients import VALUES, cut, patient

RANGE = ("2024-01-01", "2024-01-08")
HEAD = "INTERVALSTARTTIME_GMT,TAC_AREA_NAME,MW\n"
AREA = "CA ISO-TAC"


def ask(url, **options):
    client = EIAClient(KEY, url=url, http=patient(**options))
    return client.get_electricity_demand("US48", *RANGE)


def refused_by_eia(answer, **options) -> str:
    """The error's text; the key is in no part of it."""
    with serving(answer) as served, pytest.raises(SourceError) as failure:
        ask(served.url, **options)
    said = "".join(traceback.format_exception(failure.value))
    assert KEY not in said and KEY.upper() not in said and "nobody-may" not in said, said
    return str(failure.value)


def refused_by_caiso(reply: Reply) -> str:
    with serving(lambda query, headers: reply) as served, pytest.raises(SourceError) as failure:
        CAISOClient(url=served.url, http=patient()).get_electricity_demand(*RANGE)
    return str(failure.value)


@pytest.mark.parametrize("location", ["http://127.0.0.1:9/data", "https://127.0.0.1:{port}/data"])
def test_a_key_is_not_taken_to_another_port_or_scheme(location):
    asked = []

    def answer(query, headers):
        asked.append(headers.get("X-Api-Key"))
        return Reply(b"", 302, {"Location": location.format(port=served.url.rpartition(":")[2])})

    with serving(answer) as served, pytest.raises(SourceError, match="redirects to another host,"):
        ask(served.url)
    assert asked == [KEY]


def test_a_redirect_within_the_same_place_is_followed_once():
    asked = []

    def answer(query, headers):
        asked.append(query)
        if len(asked) == 1:
            start = "start=2024-01-01T00&end=2024-01-07T23&offset=0&length=5000"
            return Reply(b"", 302, {"Location": f"/v3/data/?{start}"})
        return eia(VALUES)(query, headers)

    with serving(answer) as served:
        assert len(ask(served.url)) == 168
    assert len(asked) == 2
    loop = Reply(b"", 302, {"Location": "/again"})
    assert "HTTP 302" in refused_by_eia(lambda query, headers: loop)


BASE64 = base64.b64encode(KEY.encode()).decode()


@pytest.mark.parametrize(
    "answer",
    [
        lambda q, h: as_json({"error": "x" * 190 + KEY}, 400),
        lambda q, h: as_json({"error": {"code": 1, KEY: [KEY]}}, 400),
        lambda q, h: as_json({"error": f"not {KEY.upper()} nor {BASE64}"}, 400),
        lambda q, h: as_json({"response": {KEY: 1}}),
        lambda q, h: as_json({"response": {"total": KEY, "data": []}}),
        lambda q, h: as_json({"response": {"total": 1, "data": KEY}}),
        cut(lambda r, q: r["data"][0].update(value=KEY)),
        cut(lambda r, q: r["data"][0].update(period=KEY)),
        cut(lambda r, q: [r["data"][0].pop("value"), r["data"][0].update({KEY: 1})]),
    ],
)
def test_a_key_that_the_server_echoes_is_in_no_error(answer, caplog):
    caplog.set_level(logging.DEBUG)
    said = refused_by_eia(answer)
    assert BASE64[:12] not in said and KEY not in caplog.text


def test_parts_of_a_key_are_hidden():
    assert hide("the rest-that-nob of it", KEY) == "the rest*** of it"
    assert hide("nothing of it, nob", KEY) == "nothing of it, nob"
    assert hide(f"\u0130{KEY}", KEY) == "***"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, q: r["data"][0].update(value="1e999"), r"a finite number, got '1e999'"),
        (lambda r, q: r["data"][0].update(value=float("inf")), "a finite number, got inf"),
        (lambda r, q: r["data"][0].update(value="NaN"), "a finite number, got 'NaN'"),
        (lambda r, q: r["data"][0].update(value="1_000"), "a finite number, got '1_000'"),
        (lambda r, q: r["data"][0].update(value="\u0661"), "a finite number"),
        (lambda r, q: r["data"][0].update(value=[1]), "a finite number, got a list of 1"),
        (lambda r, q: r["data"][0].update(value=True), "a finite number, got True"),
        (lambda r, q: r["data"][0].update(value=10**400), "a finite number"),
        (lambda r, q: r["data"][0].update(period=None), "a full UTC hour from 2024-01-01T00"),
        (lambda r, q: r["data"][0].update(period=["2024"]), "a full UTC hour"),
        (lambda r, q: r["data"][0].update(period="2024-02-30T00"), "a full UTC hour"),
        (lambda r, q: r["data"][0].update(period="2024-01-01"), "a full UTC hour"),
        (lambda r, q: r["data"][0].update(period="9999-01-01T00"), "a full UTC hour"),
        (lambda r, q: r["data"][0].update(period="2024-01-01T00:30"), "a full UTC hour"),
        (lambda r, q: r["data"][0].pop("period"), "a full UTC hour .* got None"),
        (lambda r, q: r["data"].insert(0, "row"), "data must be a list of rows"),
        (lambda r, q: r.update(data={"0": {}}), "data must be a list of rows, got a dict of 1"),
        (lambda r, q: r.update(data=None), "data must be a list of rows, got None"),
        (lambda r, q: r.update(total="\u00b2"), "total of region-data must be an integer"),
        (lambda r, q: r.update(total=None), "total of region-data must be an integer"),
        (lambda r, q: r.update(total=1e999), "total of region-data must be an integer"),
        (lambda r, q: r.update(total=-1), "total of region-data must be an integer"),
        (lambda r, q: r.update(total=10**9), "an integer from 0 to 336, got 1000000000"),
        (lambda r, q: r.update(total=3), "announced 3 rows of region-data but gave 168"),
        (lambda r, q: r.update(total=300, data=r["data"][:1]), "1. of 300 rows of .* in 11 pages"),
    ],
)
def test_whatever_eia_sends_is_a_source_error(change, message):
    assert re.search(message, refused_by_eia(cut(change)))


@pytest.mark.parametrize(
    "body", [b"", b"\xff", b"[1]", b"null", b'"text"', b"[" * 100_000, b'{"response": []}']
)
def test_a_body_that_is_no_reply_is_a_source_error(body):
    assert "EIA answered HTTP 200" in refused_by_eia(lambda query, headers: Reply(body))


def test_codes_of_columns_are_codes():
    def answer(query, headers):
        row = {"period": "2024-01-01T00", "respondent": "CISO", "fueltype": "=1+1", "value": 1}
        return as_json({"response": {"total": 1, "data": [row]}})

    with serving(answer) as served, pytest.raises(SourceError, match="fueltype must be a code"):
        EIAClient(KEY, url=served.url, http=patient()).get_generation_mix("CISO", *RANGE)


def test_replies_are_bounded_in_size():
    body = b" " * 5000
    said = refused_by_eia(lambda query, headers: Reply(body), largest_reply=4096)
    assert said.startswith("127.0.0.1 sends more than 4,096 bytes in one reply")


@pytest.mark.parametrize("part", ["headers", "body"])
def test_a_reply_that_drips_ends_in_time(part):
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def drip():
        connection, _ = listener.accept()
        connection.recv(65536)
        start = b"HTTP/1.1 200 OK\r\n"
        if part == "body":
            start += b"Content-Length: 100000\r\n\r\n"
        try:
            connection.sendall(start)
            while not ended.wait(0.01):
                connection.sendall(b"x")
        except OSError:
            pass
        connection.close()

    thread = threading.Thread(target=drip)
    thread.start()
    http = PatientHttp(retries=0, reply_seconds=0.2)
    try:
        with pytest.raises(SourceError, match="last: no whole reply in 0.2 s"):
            http.get(f"http://127.0.0.1:{listener.getsockname()[1]}", {})
    finally:
        ended.set()
        thread.join()
        listener.close()


@pytest.mark.parametrize(
    ("told", "slept"), [("99999999999", None), ("\u00b2", 1.0), ("7", 7.0), ("-1", 1.0)]
)
def test_a_pause_is_bounded(told, slept):
    pauses = []
    http = PatientHttp(sleep=pauses.append, retries=1)
    busy = Reply(b"", 503, {"Retry-After": told})
    with serving(lambda query, headers: busy) as served, pytest.raises(SourceError) as failure:
        http.get(served.url, {})
    assert pauses == ([] if slept is None else [slept])
    assert ("asks for a pause of more than 300 s" in str(failure.value)) == (slept is None)


def archive(*members: tuple[str, bytes], **options) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as opened:
        for name, data in members:
            opened.writestr(name, data)
    return buffer.getvalue()


def encrypted() -> bytes:
    data = bytearray(archive(("a.csv", b"x")))
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + offset] |= 1
    return bytes(data)


def unknown_method() -> bytes:
    data = bytearray(archive(("a.csv", b"x")))
    for mark, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        data[data.index(mark) + offset] = 99
    return bytes(data)


def damaged() -> bytes:
    data = bytearray(archive(("a.csv", b"abc" * 1000), compression=zipfile.ZIP_DEFLATED))
    data[40] ^= 0xFF
    return bytes(data)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (damaged(), "must answer SLD_FCST with a ZIP, got "),
        (encrypted(), "must answer SLD_FCST with a ZIP, got "),
        (unknown_method(), "must answer SLD_FCST with a ZIP, got "),
        (archive(("a.csv", b"x"))[:-30], "must answer SLD_FCST with a ZIP, got "),
        (archive(*[(f"{n}.csv", b"") for n in range(17)]), "at most 16 files in a ZIP, got 17"),
        (archive(("a.csv", b"\xff\xfe")), "with a table in UTF-8"),
        (archive(("a.csv", HEAD.encode() + b"x" * 140_000)), "field larger than field limit"),
        (archive(("a.xml", b"<a" * 10)), "an XML document that cannot be read"),
        (archive(("a.xml", b'<?xml version="1.0" encoding="no"?><a/>')), "cannot be read"),
    ],
)
def test_an_archive_that_is_none_is_a_source_error(body, message):
    assert message in refused_by_caiso(Reply(body))


def test_archives_are_bounded_when_unpacked(monkeypatch):
    monkeypatch.setattr(caiso_source, "LARGEST_ARCHIVE", 1 << 16)
    members = [(f"{n}.csv", b"0" * 40_000) for n in range(2)]
    body = archive(*members, compression=zipfile.ZIP_DEFLATED)
    assert len(body) < 1000
    assert "a ZIP of more than 65,536 bytes when unpacked" in refused_by_caiso(Reply(body))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (f"soon,{AREA},1", "must be a full UTC hour .* got 'soon'"),
        (f"2024-01-01T00:30:00-00:00,{AREA},1", "must be a full UTC hour"),
        (f"2024-01-01T00:00:00-08:00,{AREA},1", "must be a full UTC hour"),
        (f"0001-01-01T00:00:00-00:00,{AREA},1", "must be a full UTC hour from 2023-12-31T00"),
        (f"2024-01-01T00:00:00-00:00,{AREA},1e999", "a finite number, got '1e999'"),
        (f"2024-01-01T00:00:00-00:00,{AREA},much", "a finite number, got 'much'"),
        (f"2024-01-01T00:00:00-00:00,{AREA},nan", "a finite number, got 'nan'"),
    ],
)
def test_rows_of_caiso_are_hours_and_numbers(row, message):
    assert re.search(message, refused_by_caiso(oasis_zip(HEAD + row + "\n")))


def test_short_and_long_rows_of_caiso():
    short = oasis_zip(f"{HEAD}2024-01-01T00:00:00-00:00\n")
    assert "has [None]" in refused_by_caiso(short)
    long = oasis_zip("A,B\n1,2,3\n")
    assert "got 'A, B, None'" in refused_by_caiso(long)


def test_eia_hours_that_cannot_be_count_as_missing():
    spoilt = VALUES | {
        "2024-01-02T00": "2147483647",
        "2024-01-02T01": "-50",
        "2024-01-02T02": "99999",
        "2024-01-02T03": "0",
    }
    with serving(eia(spoilt)) as served:
        series = ask(served.url)
    assert np.isnan(series.target[24:27]).all() and series.target[27] == 0
    assert series.quality.implausible_values == series.quality.missing_values == 3
    assert series.quality.sentence().endswith("3 missing values, 3 implausible values")


def test_prices_and_generation_may_be_negative():
    text = "INTERVALSTARTTIME_GMT,LMP_TYPE,MW\n" + "".join(
        f"{hour}:00:00-00:00,LMP,{value}\n"
        for hour, value in zip(hours("2024-01-01", 4), (-20, 900, 1, 2147483647), strict=True)
    )
    with serving(lambda query, headers: oasis_zip(text)) as served:
        series = CAISOClient(url=served.url, http=patient()).get_price(*RANGE)
    assert series.target[:3].tolist() == [-20, 900, 1] and np.isnan(series.target[3])


def write(tmp_path, text, name="load.csv"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_a_file_of_demand_is_screened_and_says_so(tmp_path):
    rows = "".join(f"{hour}:00,{n}\n" for n, hour in enumerate(hours("2024-01-01", 6)))
    path = write(tmp_path, "time,demand\n" + rows + "2024-01-01T06:00,-4\n")
    assert np.isnan(read_csv(path).target[6])
    assert read_csv(path, quantity="any").target[6] == -4
    done = CliRunner().invoke(
        cli.commands, ["data", "csv", "--csv", str(path), "--out", str(tmp_path / "o.csv")]
    )
    assert done.exit_code == 0
    assert "1 implausible values" in done.output
    assert "count as missing: demand below 0 or above 10 times its median" in done.output
    assert "2024-01-01T06,\n" in (tmp_path / "o.csv").read_text()


def test_a_column_that_is_no_demand_is_refused(tmp_path):
    rows = "".join(f"{hour}:00,{n - 30}\n" for n, hour in enumerate(hours("2024-01-01", 60)))
    path = write(tmp_path, "time,price\n" + rows)
    with pytest.raises(ValueError, match="price of load.csv must be demand, got 30 values in 60"):
        read_csv(path, target="price")
    assert read_csv(path, target="price", quantity="any").quality.implausible_values == 0
    assert read_columns(path).columns["price"][0] == -30
    with pytest.raises(ValueError, match="quantity must be one of"):
        read_csv(path, target="price", quantity="load")


def test_empty_rows_are_left_out(tmp_path):
    """At the hour that clocks skip, as gridded exports have it, and behind the table."""
    text = "time,load\n2024-03-10 01:00,1\n2024-03-10 02:00,\n2024-03-10 03:00,3\n,\n , \n"
    series = read_csv(write(tmp_path, text), time_zone="America/Los_Angeles")
    assert series.target.tolist() == [1, 3] and series.quality.rows == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time,load\n0001-01-01 00:00+14:00,1\n", "years 1 to 9999 of UTC"),
        ("time,load\n2024-01-01 00:00:00.5,1\n", "must be full hours, got '2024-01-01 00:00:00.5'"),
        ("time,load,load\n2024-01-01 00:00,1,2\n", r"every column once, got \['load'\] again"),
        ("time,load\n2024-01-01 00:00,1,234\n", "as many values as there are names.*line 2"),
        ("time,load\n2024-01-01 00:00," + "1" * 140_000, "field larger than field limit"),
        ("time,load\n0001-01-01 00:00,1\n9999-01-01 00:00,1\n", "at most 876,600 hours"),
    ],
)
def test_what_else_is_wrong_with_a_file_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_csv(write(tmp_path, text))


def test_rows_with_commas_behind_them_are_read(tmp_path):
    path = write(tmp_path, "time,load\n2024-01-01 00:00,1,\n2024-01-01 01:00,2,,\n")
    assert read_csv(path).target.tolist() == [1, 2]


@pytest.mark.parametrize("name", ["=HYPERLINK(1)", "+a", "-a", "@a", " =a"])
def test_names_that_spreadsheets_run_are_not_written(tmp_path, name):
    times = np.array(["2024-01-01T00"], "datetime64[h]")
    series = HourlySeries.from_rows(times, {name: np.ones(1)}, "rows")
    with pytest.raises(ValueError, match="must not begin with = \\+ - or @"):
        series.write_csv(tmp_path / "o.csv")
    assert not list(tmp_path.iterdir())


def test_ranges_are_bounded():
    with serving(eia(VALUES)) as served, pytest.raises(ValueError, match="shorter than 876,600"):
        EIAClient(KEY, url=served.url).get_electricity_demand("US48", "0001-01-01", "9999-01-01")
    assert not served.queries
