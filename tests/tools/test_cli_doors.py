"""What comes in by the command line: one line and exit code 2, before anything is measured."""

import json

import pytest
from click.testing import CliRunner

from nnscaler_ring.simulator.cluster import PRESETS, load_cluster
from nnscaler_ring.tools.commands import bench as bench_command
from nnscaler_ring.tools.commands import commands
from nnscaler_ring.tools.commands.options import LARGEST_SIZE, parse_size


def refused(*args: object) -> str:
    done = CliRunner().invoke(commands, list(map(str, args)))
    assert done.exit_code == 2, (done.output, done.exception)
    assert "Traceback" not in done.output
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("Error: ")
    return lines[-1]


def cluster(**changes: object) -> str:
    """The text of a cluster's file; a name with two underscores is a place within."""
    data = json.loads((PRESETS / "h200.json").read_text())
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            data[part][field] = value
        else:
            data[name] = value
    return json.dumps(data)


NO_FILE = "is not a cluster's file"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, NO_FILE),
        ("[]", NO_FILE),
        ("{}", NO_FILE),
        ("\xff", NO_FILE),
        (cluster(inside="x"), NO_FILE),
        (cluster(rates={"float32": 7}), NO_FILE),
        (cluster(memory_bytes=float("nan")), NO_FILE),
        (cluster(memory_bytes=float("inf")), NO_FILE),
        (cluster(inside__latency_seconds=float("nan")), NO_FILE),
        (cluster(memory_bytes="12"), "memory_bytes of a cluster must be above 0 and finite, got '"),
        (cluster(memory_bytes=10**400), "memory_bytes of a cluster must be above 0 and finite"),
        (cluster(memory_bytes=True), "memory_bytes of a cluster must be above 0 and finite"),
        (cluster(memory_bytes=[0] * 999), "above 0 and finite, got a list of 999"),
        (cluster(inside__latency_seconds=-1e9), "inside.latency_seconds of a cluster must be 0 or"),
        (cluster(between__bytes_per_second=None), "between.bytes_per_second of a cluster must be"),
        (cluster(devices_per_node=2.5), "devices_per_node of a cluster must be an integer above 0"),
        (cluster(overlap="all"), "overlap of a cluster must be from 0 to 1, got 'all'"),
        (cluster(device_type="tpu"), "device_type of a cluster must be 'cpu' or 'cuda'"),
        (cluster(name=7), "name of a cluster must be one line of text, got 7"),
        (cluster(name="a\nb\x1b[31m"), "name of a cluster must be one line of text"),
        (cluster(source=["x"]), "source of a cluster must be one line of text"),
    ],
    ids=lambda text: None,
)
def test_a_cluster_file_that_cannot_be(tmp_path, text, message):
    path = tmp_path / "mine.json"
    path.write_bytes(text.encode("latin-1"))
    assert message in refused("plan", "--tokens", 8, "--ranks", 1, "--device", path)


def test_a_rate_that_cannot_be(tmp_path):
    data = json.loads(cluster())
    data["rates"]["bfloat16"]["forward_call_seconds"] = -1
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"rates.bfloat16.forward_call_seconds .* 0 or above"):
        load_cluster(str(path))


def test_names_are_printed_as_they_are(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(cluster(name="my [/] [red]", source="[/]"))
    done = CliRunner().invoke(
        commands, ["plan", "--tokens", "64", "--ranks", "2", "--device", str(path)]
    )
    assert done.exit_code == 0, done.exception
    assert "my [/] [red]" in done.output


@pytest.mark.parametrize("option", ["--reserve-gb", "--memory-gb", "--link-gb", "--network-gb"])
@pytest.mark.parametrize("value", ["nan", "inf", "much"])
def test_amounts_are_finite(option, value):
    told = refused("plan", "--tokens", 8, "--ranks", 1, option, value)
    assert f"'{value}' is not a finite number" in told


@pytest.mark.parametrize("command", ["simulate", "demo"])
@pytest.mark.parametrize("seed", ["-1", f"-{10**23}", f"{10**27}", "1.5", "nan"])
def test_seeds_are_integers_that_torch_takes(command, seed, tmp_path):
    assert "'--seed'" in refused(command, "--seed", seed, "--out", tmp_path)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("65536", 65536), ("1_000_000", 10**6), ("1e6", 10**6), ("1E+6", 10**6)),
        *(("64k", 64_000), ("64K", 64_000), ("64Ki", 65536), ("1M", 10**6), ("1.5M", 1_500_000)),
        *(("2G", 2 * 10**9), ("1Gi", 2**30), ("0.5k", 500), ("-1", -1), (" 8 ", 8)),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "M",
        "1T",
        "1.5",
        "1e-3",
        "nan",
        "1e99",
        "9" * 99,
        "1e16",
        "0x10",
        "1,000",
        "\u0661",
        "k1",
    ],
)
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="sizes are whole"):
        parse_size(text)
    assert "sizes are whole" in refused("plan", "--ranks", 1, "--tokens", text)


def test_the_largest_size():
    assert parse_size(f"{LARGEST_SIZE}") == LARGEST_SIZE


def test_windows_have_sizes():
    args = ["plan", "--tokens", "1M", "--ranks", "8", "--mask", "causal:4k", "--json"]
    done = CliRunner().invoke(commands, args)
    job = json.loads(done.output)["job"]
    assert job["tokens"] == 1_000_000 and job["mask"]["left"] == 4000


@pytest.fixture
def unmeasured(monkeypatch):
    """A bench that fails as soon as it measures."""

    def measure(*args, **options):
        raise AssertionError("measured")

    monkeypatch.setattr(bench_command, "calibrate", measure)
    monkeypatch.setattr(bench_command, "replay", measure)


@pytest.mark.parametrize(
    "args",
    [
        ("--calibrate", "--out", "{file}/below.json"),
        ("--calibrate", "--report", "{file}/below.json"),
        ("--device", "cpu", "--out", "{file}/below.json"),
        ("--calibrate", "--out", "/proc/none.json"),
    ],
)
def test_a_bench_that_cannot_write_measures_nothing(tmp_path, unmeasured, args):
    file = tmp_path / "file"
    file.write_text("")
    told = refused("bench", *(arg.format(file=file) for arg in args))
    assert "below.json" in told or "file" in told or "none.json" in told or "/proc" in told


@pytest.mark.parametrize("command", ["simulate", "demo"])
def test_outputs_are_checked_first(tmp_path, command):
    file = tmp_path / "file"
    file.write_text("")
    assert "file" in refused(command, "--out", file / "below")
    (tmp_path / f"{'demo' if command == 'demo' else 'simulation'}.json").mkdir()
    assert "must be a file, got a folder" in refused(command, "--out", tmp_path)
