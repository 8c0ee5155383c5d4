"""The demonstrations and `simulate`, small: they run, check themselves and write what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from nnscaler_ring.tools.commands import commands

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["window", "dilated"])
def test_one_share_of_many(pattern: str, tmp_path: Path) -> None:
    out = tmp_path / "share.json"
    sizes = ("--tokens", "40000", "--ranks", "10", "--rank", "7", "--segment", "256")
    text = run("one_share_of_a_billion.py", *sizes, "--pattern", pattern, "--out", str(out))
    assert "one rank's share" in text
    figures = json.loads(out.read_text())
    assert figures["largest_relative_error"] < 2e-6
    assert figures["tokens_of_a_share"] == 4000
    # q, k, v, out and sums of 4000 rows of 16 float32, a message and one block: not 40000 rows.
    assert figures["peak_bytes"] < 16 * 4000 * 16 * 4 + (1 << 20)


@pytest.mark.slow
def test_all_shares_in_turn() -> None:
    sizes = ("--tokens", "4000", "--ranks", "4", "--all-shares", "--sampled-rows", "4")
    text = run("one_share_of_a_billion.py", *sizes)
    assert "every rank's share in turn" in text
    assert "16 sampled rows" in text


@pytest.mark.slow
def test_exact_rows_at_constant_memory(tmp_path: Path) -> None:
    peaks = []
    for keys in (200_000, 400_000):
        out = tmp_path / "rows.json"
        run("exact_rows.py", "--keys", str(keys), "--queries", "8", "--out", str(out))
        figures = json.loads(out.read_text())
        assert figures["relative_error"] < 2e-6
        peaks.append(figures["peak_bytes"])
    assert peaks[0] == peaks[1]


@pytest.mark.full
def test_memory_scaling_over_processes(tmp_path: Path) -> None:
    sizes = (
        "--ranks",
        "2",
        "4",
        "--tokens",
        "8192",
        "--tokens-per-rank",
        "2048",
        "--within",
        "0.3",
    )
    text = run("memory_scaling.py", *sizes, "--out", str(tmp_path))
    assert "O(tokens / ranks)" in text
    record = json.loads((tmp_path / "memory_scaling.json").read_text())
    by_kind = {(row["kind"], row["ranks"]): row["counted_bytes"] for row in record["rows"]}
    assert by_kind["direct, strong", 4] < 0.8 * by_kind["direct, strong", 2]
    assert by_kind["all_gather, strong", 4] > 1.5 * by_kind["direct, strong", 4]
    assert (
        by_kind["replicated queries, forward", 4] > 0.7 * by_kind["replicated queries, forward", 2]
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--share", "2"), ("--forward-only", "--mask", "300:0")])
def test_simulate_writes_a_report(options: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["simulate", "--tokens", "1000", "--ranks", "3", "--out", str(tmp_path), *options]
    result = CliRunner().invoke(commands, arguments)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "simulation.json").read_text())
    assert record["is_exact"]
    assert record["sent_bytes"] == record["predicted_sent_bytes"]
    report = (tmp_path / "simulation.md").read_text()
    assert "**Results are exact**" in report
    for picture in ("memory", "timeline", "mask"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 5000
        assert f"({picture}.png)" in report


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    "script",
    [
        "exact_rows",
        pytest.param("one_share_of_a_billion", marks=pytest.mark.full),
        pytest.param("memory_scaling", marks=pytest.mark.full),
    ],
)
def test_a_gpu_that_is_not_there_is_refused(script: str) -> None:
    command = [sys.executable, str(ROOT / "examples" / f"{script}.py"), "--device", "cuda"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "error: " in done.stderr and "cuda" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_simulate_refuses_a_gpu_that_is_not_there() -> None:
    result = CliRunner().invoke(commands, ["simulate", "--device", "cuda"])
    assert result.exit_code == 2
    assert "device must be one of ['cpu'] on this machine, got cuda" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ranks 0", "ranks must be at least 1"),
        ("--tokens 0", "tokens must be at least 1"),
        ("--share 4", "share must be a rank from 0 to 3"),
        ("--cluster nothing", "device must be one of"),
    ],
)
def test_simulate_refuses_nonsense(options: str, message: str) -> None:
    result = CliRunner().invoke(commands, ["simulate", *options.split()])
    assert result.exit_code == 2
    assert message in result.stderr
