"""What a newcomer gets wrong: one line that says what to do, and nothing half-written."""

import pytest
from click.testing import CliRunner

from examples.energy_forecasting import cli
from examples.energy_forecasting.training import train
from tests.energy_forecasting.example_series import SMALL, excerpt
from tests.energy_forecasting.server import KEY
from tests.energy_forecasting.test_training import ALONE

HOURS = [f"2024-01-{day:02}T{hour:02}:00" for day in range(1, 31) for hour in range(24)]


def fails(*arguments: object) -> str:
    """What the command says on its last line."""
    done = CliRunner().invoke(cli.commands, list(map(str, arguments)))
    assert done.exit_code in (1, 2) and "Traceback" not in done.output, done.output
    return " ".join(done.output.split("Error: ")[-1].split())


def table(names: str, value: str) -> bytes:
    return "\n".join([names, *(f"{hour},{value}" for hour in HOURS)]).encode()


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", (), "must begin with a line of column names, got an empty file"),
        (b"PK\x03\x04\xff\xfe", (), "must be a CSV file in UTF-8"),
        (b"time;demand\n2024-01-01T00:00;1\n", (), "separate columns by commas"),
        (table("time,mw", "1"), (), "name the column to forecast (--target)"),
        (table("hour,demand", "1"), (), "rename the column of hours to 'time_utc'"),
        (table("time,demand", "1"), ("--channel", "x"), "name columns that it has (--channel)"),
        (table("time,demand", "inf"), (), "got 'inf' in load.csv line 2; leave what is missing"),
        (table("time,demand", "1,234.5"), ("--clocks", "PST"), "--clocks must be an IANA name"),
        (table("time,demand", "1"), ("--time-zone", "PST"), "time_zone must be an IANA name"),
        (table("time,demand", "1"), (), "take a longer series, a shorter --context, or --excerpt"),
        (
            table("time,demand", ""),
            ("--excerpt", "--context", "168", "--ranks", "1"),
            "take a longer series",
        ),
    ],
)
def test_a_file_that_cannot_be_trained_on(tmp_path, content, options, message):
    path = tmp_path / "load.csv"
    path.write_bytes(content)
    checkpoint = tmp_path / "run" / "c.pt"
    said = fails("train", "--csv", path, "--checkpoint", checkpoint, *options)
    assert message in said
    assert list(tmp_path.iterdir()) == [path]


def test_a_series_without_a_value(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "EXCERPT", SMALL)
    path = tmp_path / "load.csv"
    rows = (f"{hour}," for hour in excerpt().times)
    path.write_text("\n".join(["time,demand", *rows]))
    said = fails(
        "train", "--csv", path, "--excerpt", "--ranks", "1", "--checkpoint", tmp_path / "c"
    )
    assert "0 observed values, all alike, in the training hours; choose another column" in said
    assert list(tmp_path.iterdir()) == [path]


def test_joined_files_have_their_own_names_and_the_same_hours(tmp_path):
    load, other = tmp_path / "load.csv", tmp_path / "other.csv"
    load.write_bytes(table("time,demand", "1"))
    given = ("data", "csv", "--csv", load, "--join", other, "--out", tmp_path / "out.csv")
    other.write_bytes(table("time,demand", "2"))
    assert "other.csv must have names of their own, got ['demand'] again" in fails(*given)
    other.write_bytes(table("time,wind", "2").replace(b"2024-", b"2023-"))
    assert "720 from 2023-01-01T00 on; fetch the same range" in fails(*given)
    assert sorted(tmp_path.iterdir()) == [load, other]


@pytest.mark.parametrize("key", [f"{KEY} twice", f"{KEY}\nEIA_API_KEY", f"{KEY}\u2026"])
def test_a_key_that_was_copied_badly_is_not_repeated(tmp_path, monkeypatch, key):
    monkeypatch.setenv("EIA_API_KEY", key)
    out = tmp_path / "out.csv"
    said = fails("data", "eia", "--start", "2024-01-01", "--end", "2024-01-02", "--out", out)
    assert "copy it again" in said and KEY not in said and not out.exists()


@pytest.mark.parametrize("start", ["", "NaT", "last year", "01/31/2024"])
def test_dates_that_are_none(tmp_path, monkeypatch, start):
    monkeypatch.setenv("EIA_API_KEY", KEY)
    said = fails("data", "eia", "--start", start, "--end", "2024-01-02", "--out", tmp_path / "o")
    assert "start_date must be a UTC date or hour such as '2024-01-31'" in said


def test_folders_and_files_are_told_apart(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert "is a directory" in fails("train", "--csv", tmp_path)
    assert "is a directory" in fails("train", "--checkpoint", tmp_path)
    assert "is a directory" in fails("data", "csv", "--out", tmp_path)
    assert "is a file" in fails("evaluate", "--out", file)


@pytest.mark.parametrize("command", ["evaluate", "forecast"])
def test_a_checkpoint_that_is_not_ready(tmp_path, command):
    path = tmp_path / "c.pt"
    assert "does not exist; run train first" in fails(command, "--checkpoint", path)
    path.write_text("text")
    assert "train again, with another --checkpoint" in fails(command, "--checkpoint", path)
    path.unlink()
    train(ALONE, excerpt(), SMALL, path, max_seconds=0)
    said = fails(command, "--checkpoint", path)
    assert "this checkpoint of step 1 has seen none; go on training" in said
    assert list(tmp_path.iterdir()) == [path]
