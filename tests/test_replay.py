"""The ranks' schedules on one device: what is timed, what is counted, and the command's rows."""

import json
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.table import provenance, tables
from nnscaler_ring.commands import commands
from nnscaler_ring.commands import replay as command
from nnscaler_ring.core.exchange import DirectPlan
from nnscaler_ring.replay import Case, Stopwatch, cases, measure

CPU = torch.device("cpu")
SMALL = {"ranks": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "dtype": "float32"}


def test_the_default_cases_are_those_of_the_issue():
    chosen = cases((65536, 131072, 524288))
    assert {case.backward for case in chosen} == {False, True}
    labels = {case.label for case in chosen if not case.backward}
    assert labels == {
        "causal 64k forward",
        "causal 128k forward",
        "causal 512k forward",
        "causal 64 documents 128k forward",
        "causal window 4096 128k forward",
    }
    assert {case.ranks for case in chosen} == {8}


@pytest.mark.parametrize("case", cases((300, 500), **SMALL), ids=lambda case: case.label)
def test_ranks_compute_what_one_device_computes(case):
    results = measure(case, CPU, reps=1)
    assert results["relative_l2_to_one_device"] < 2e-6
    assert results["kept_fraction"] > 0 and results["kernel"] == "torch_cpu"
    dense = case.documents == 1 and case.window is None
    assert (results["sdpa_seconds"] is not None) == dense
    call = case.call(case.ranks)
    for rank, sent in enumerate(results["modelled_communication"]["sent_bytes_by_rank"]):
        plan = DirectPlan(call.schedule, rank).sent()
        rows = plan.kv_rows * (2 if case.backward else 1)
        rows += (plan.gradient_rows + plan.summed_gradient_rows) * case.backward
        assert sent == rows * call.sizes.kv_numbers * 4


def test_what_is_done_aside_does_not_count():
    watch = Stopwatch(CPU)

    def run() -> None:
        time.sleep(0.01)
        with watch.aside():
            time.sleep(0.2)

    assert 0.01 <= watch.seconds(run) < 0.1


def test_flops_of_a_causal_pass():
    """4 operations per pair, head and channel forward, 10 backward."""
    case = Case(300, backward=True, **SMALL)
    results = measure(case, CPU, reps=1)
    flops = 300 * 301 / 2 * (4 + 10) * 4 * 16
    seconds = results["one_device_seconds"][0]
    assert results["kernel_tflops_per_second"] == pytest.approx(flops / seconds / 1e12)


def bench(device: str, out: Path, *more: str) -> tuple[str, list[dict]]:
    args = ["bench", "--device", device, "--ranks", "2", "--reps", "1", "--out", str(out), *more]
    done = CliRunner().invoke(commands, args)
    assert done.exit_code == 0, done.output
    return done.output, [json.loads(line) for line in out.read_text().splitlines()]


def test_the_command_prints_and_keeps_whole_rows(tmp_path):
    output, rows = bench("cpu", tmp_path / "rows.jsonl", "--tokens", "256")
    assert len(rows) == 6 and "Compute only" in output and "modelled" in output
    for row in rows:
        assert row["error"] is None and row["date"] and row["versions"]["torch"]
        assert row["device"]["name"] and len(row["commit"]) == 40
        assert set(row["parameters"]) >= {"tokens", "ranks", "dtype", "device"}
    assert len(list(tables(rows))) == 6 and len(list(provenance(rows))) == 1


def test_a_case_that_is_too_large_is_told_in_its_row(monkeypatch):
    def fail(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(command, "measure", fail)
    row = command.make_row(Case(300, **SMALL), "cpu", 1)
    assert row["error"] == "out of memory: CUDA out of memory" and row["seconds"] is None
    assert list(tables([row]))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--device", "cuda"], "device cuda must be one that torch finds here, ['cpu']"),
        ([], "give either --calibrate or --device"),
        (["--device", "cpu", "--calibrate"], "give either --calibrate or --device"),
        (["--device", "cpu", "--tokens", "3"], "3 is not in the range"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_said(monkeypatch, args, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(commands, ["bench", *args])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


@pytest.mark.cuda
def test_the_command_on_a_gpu(tmp_path):
    _, rows = bench("cuda", tmp_path / "rows.jsonl", "--tokens", "4096")
    for row in rows:
        assert row["error"] is None, row
        assert row["results"]["relative_l2_to_one_device"] < 0.02
