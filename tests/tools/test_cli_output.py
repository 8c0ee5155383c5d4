"""What the commands print: JSON alone, the verdict first, whole values, a telling exit code."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from nnscaler_ring.tools.check import Case
from nnscaler_ring.tools.commands import COMMANDS, bench, commands, demo, replay, simulate
from nnscaler_ring.tools.commands import check as check_command

NAMES = [command.name for command in COMMANDS]
PLAN = ("plan", "--tokens", "1M", "--ranks", "8", "--kv-heads", "8")


def run(*args: str, columns: int | None = None):
    environment = {} if columns is None else {"COLUMNS": str(columns)}
    return CliRunner(env=environment).invoke(commands, args)


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_h_and_json(name):
    told = run(name, "-h")
    assert told.exit_code == 0 and "-h, --help" in told.output and "--json" in told.output


def test_no_help_is_cut():
    told = run("-h", columns=60)
    assert "..." not in told.output.replace("COMMAND [ARGS]...", "")
    text = " ".join(told.output.split())
    for command in COMMANDS:
        assert " ".join(command.help.split("\n\n")[0].split()).rstrip(".") in text


def test_the_verdict_comes_first():
    told = lines(run(*PLAN).output)
    assert told[0].startswith("1,000,000 tokens over 8 ranks, 125,000 each")
    assert told[1].startswith("zigzag layout, exchange='direct', 8 ranks; 1 rank would be enough")


@pytest.mark.parametrize("columns", [30, 60])
def test_values_are_whole_however_narrow(columns):
    wide, narrow = run(*PLAN).output, run(*PLAN, columns=columns).output
    memory = [line.split()[2:4] for line in lines(wide) if line.startswith(("zigzag ", "contig"))]
    text = " ".join(narrow.split())
    assert "\u2026" not in narrow and all(" ".join(value) in text for value in memory[1:7])


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_nothing_fits_is_exit_code_1(more):
    told = run("plan", "--tokens", "1M", "--ranks", "1", "--memory-gb", "1", *more)
    assert told.exit_code == 1 and "Nothing fits: use at least" in told.output


@pytest.mark.parametrize(
    ("mask", "sides"),
    [("causal", (None, 0)), ("full", (None, None)), ("causal:4Ki", (4096, 0)), ("3:-1", (3, None))],
)
def test_no_bound_is_null(mask, sides):
    job = json.loads(run(*PLAN, "--mask", mask, "--json").output)["job"]
    assert (job["mask"]["left"], job["mask"]["right"]) == sides


def test_check_as_json(monkeypatch):
    def off(cases: list[Case], **options: object) -> dict[Case, float]:
        return {case: float("nan") if n == 5 else 0.0 for n, case in enumerate(cases)}

    monkeypatch.setattr(check_command, "run_cases", off)
    told = run("check", "--quick", "--json")
    facts = json.loads(told.stdout)
    assert told.exit_code == 1 and not facts["is_exact"]
    assert facts["calls"][5]["error"] is None and not facts["calls"][5]["is_ok"]
    assert facts["calls"][4]["error"] == 0.0 and facts["limits"]["float64"]["largest"] == 1e-10
    told = run("check", "--quick")
    assert lines(told.output)[0] == f"1 of {len(facts['calls'])} calls are off."


def test_simulate_as_json(monkeypatch, tmp_path):
    record = {"is_exact": False, "sampled_rows": 3, "largest_error": 1.0, "simulated": "x"}
    monkeypatch.setattr(simulate, "run_simulation", lambda *args: record)
    monkeypatch.setattr(simulate, "write_pictures", lambda *args: [])
    monkeypatch.setattr(simulate, "markdown", lambda *args: "")
    told = run("simulate", "--out", str(tmp_path), "--json")
    assert told.exit_code == 1 and json.loads(told.stdout)["sampled_rows"] == 3
    assert json.loads((tmp_path / "simulation.json").read_text()) == json.loads(told.stdout)
    told = run("simulate", "--out", str(tmp_path))
    assert lines(told.output)[0] == "WRONG: 3 sampled rows within 1.0e+00 of float64"


def test_bench_as_json(monkeypatch, tmp_path):
    class Measured:
        def to_json(self) -> dict[str, str]:
            return {"name": "here"}

    monkeypatch.setattr(bench, "calibrate", lambda advance: Measured())
    monkeypatch.setattr(bench, "compare", lambda *args: [])
    told = run("bench", "--calibrate", "--json", "--out", str(tmp_path / "c.json"))
    assert told.exit_code == 0, told.exception
    assert json.loads(told.stdout)["cluster"] == {"name": "here"}


def test_replay_as_json(monkeypatch):
    def failed(case: object, *args: object) -> dict[str, object]:
        return {"error": "failed", "results": {}, "took_seconds": 1.0, "parameters": {"label": "x"}}

    monkeypatch.setattr(replay, "make_row", failed)
    told = run("bench", "--device", "cpu", "--tokens", "256", "--json")
    assert told.exit_code == 1 and json.loads(told.stdout)[0]["error"] == "failed"
    assert "failed" in told.stderr


def test_demo_as_json(monkeypatch, tmp_path):
    class Result:
        is_equal = False

    monkeypatch.setattr(demo, "prepare", lambda config: type("Corpus", (), {"source": "text"}))
    monkeypatch.setattr(demo, "run_demo", lambda *args: Result())
    monkeypatch.setattr(demo, "write_report", lambda *args: [])
    monkeypatch.setattr(demo, "summary", lambda *args: {"equal": False})
    told = run("demo", "--out", str(tmp_path), "--json")
    assert told.exit_code == 1 and json.loads(told.stdout) == {"equal": False}


def test_shells_can_complete():
    environment = os.environ | {
        "_NNSCALER_RING_COMPLETE": "bash_complete",
        "COMP_WORDS": "nnscaler-ring simulate --layout z",
        "COMP_CWORD": "3",
    }
    done = subprocess.run(
        [sys.executable, "-m", "nnscaler_ring"],
        env=environment,
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.split() == ["plain,zigzag"], done.stderr
