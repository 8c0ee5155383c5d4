"""The ranks' schedules on one device: what is timed, what is counted, and the command's rows."""

import json
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.table import provenance, tables
from nnscaler_ring.core.kernels.native.library import library
from nnscaler_ring.tools import replay
from nnscaler_ring.tools.commands import commands
from nnscaler_ring.tools.commands import replay as command
from nnscaler_ring.tools.replay import (
    MERGES,
    Case,
    Replay,
    Stopwatch,
    cases,
    flops,
    measure,
    merge_bandwidth,
)

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


CPU_KERNEL = "torch_cpu" if isinstance(library(), str) else "cpu_tiles"  # of float32


@pytest.mark.parametrize("case", cases((300, 500), **SMALL), ids=lambda case: case.label)
def test_ranks_compute_what_one_device_computes(case):
    results = measure(case, CPU, reps=1)
    assert results["relative_l2_to_one_device"] < 2e-6
    assert results["kept_fraction"] > 0 and results["kernel"] == CPU_KERNEL
    dense = case.documents == 1 and case.window is None
    assert (results["sdpa_seconds"] is not None) == dense
    call = case.call(case.ranks)
    for rank, sent in enumerate(results["modelled_communication"]["sent_bytes_by_rank"]):
        plan = call.program(rank).sent()
        rows = plan.kv_rows * (2 if case.backward else 1)
        rows += (plan.gradient_rows + plan.summed_gradient_rows) * case.backward
        assert sent == rows * call.sizes.kv_numbers * 4


def test_the_least_work_comes_first():
    """A run that is cut off has lost the fewest cases, and those that take longest."""
    chosen = cases((65536, 131072, 524288))
    assert [flops(case) for case in chosen] == sorted(flops(case) for case in chosen)
    assert chosen[-1].label == "causal 512k forward+backward"


def test_results_that_are_not_finite_are_an_error(monkeypatch):
    """Also where they are only some rank's: max() passes over nan."""
    forward = replay.attention_forward

    def spoiled(q, *args, **options):
        out, lse = forward(q, *args, **options)
        return (out * torch.nan if q.shape[1] < 100 else out), lse

    monkeypatch.setattr(replay, "attention_forward", spoiled)
    with pytest.raises(RuntimeError, match="rank 0's results are not finite"):
        measure(Case(200, **SMALL), CPU, reps=1)


def test_what_sdpa_cannot_do_costs_its_own_figure_alone(monkeypatch):
    def fail(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 256 GiB")

    monkeypatch.setattr(replay.F, "scaled_dot_product_attention", fail)
    results = measure(Case(200, **SMALL), CPU, reps=1)
    assert results["sdpa_seconds"] is None
    assert results["sdpa_refusal"] == "CUDA out of memory."
    assert results["relative_l2_to_one_device"] < 2e-6


def test_a_merge_is_timed_by_many(monkeypatch):
    """One alone may take less time than its launch."""
    monkeypatch.setattr(Stopwatch, "seconds", lambda watch, run: run() or 20.0)
    merges = []
    monkeypatch.setattr(replay, "merge_", lambda *tensors: merges.append(1))
    found = merge_bandwidth(Stopwatch(CPU), Replay.of(Case(300, **SMALL), CPU), reps=1)
    assert len(merges) == 2 * MERGES  # the first run does not count
    assert found["seconds"] == 20.0 / MERGES


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


def bench(device: str, out: Path, *more: str, exit_code: int = 0) -> tuple[str, list[dict]]:
    args = ["bench", "--device", device, "--ranks", "2", "--reps", "1", "--out", str(out), *more]
    done = CliRunner().invoke(commands, args)
    assert done.exit_code == exit_code, done.output
    return done.output, [json.loads(line) for line in out.read_text().splitlines()]


def test_the_command_prints_and_keeps_whole_rows(tmp_path):
    output, rows = bench("cpu", tmp_path / "rows.jsonl", "--tokens", "256")
    assert len(rows) == 6 and "Compute only" in output and "modelled" in output
    for row in rows:
        assert row["error"] is None and row["date"] and row["versions"]["torch"]
        assert row["device"]["name"] and len(row["commit"]) == 40
        assert set(row["parameters"]) >= {"tokens", "ranks", "dtype", "device"}
        assert set(row["versions"]) >= {"torch", "triton", "cuda", "cudnn", "nccl", "driver"}
        assert row["took_seconds"] > row["seconds"]["max"]
    assert len(list(tables(rows))) == 6 and len(list(provenance(rows))) == 1


def test_one_case_can_be_asked_for(tmp_path):
    more = ["--tokens", "256", "--only", "causal 256 forward", "--only", "window"]
    _, rows = bench("cpu", tmp_path / "rows.jsonl", *more, "--only", "nothing has this")
    labels = {row["parameters"]["label"] for row in rows}
    assert labels == {
        f"causal{window} 256 {passes}"
        for window in ("", " window 8")
        for passes in ("forward", "forward+backward")
    }


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory: CUDA out of memory"),
        (RuntimeError("cuDNN Frontend error\n at"), "failed: cuDNN Frontend error"),
    ],
    ids=["memory", "kernel"],
)
def test_a_case_that_fails_is_told_in_its_row_and_costs_no_other(
    monkeypatch, tmp_path, problem, told
):
    def fail_once(case: Case, *args: object, **options: object) -> object:
        if case.window is not None:
            raise problem
        return measure(case, *args, **options)

    monkeypatch.setattr(command, "measure", fail_once)
    output, rows = bench("cpu", tmp_path / "rows.jsonl", "--tokens", "256", exit_code=1)
    errors = [row["error"] for row in rows]
    assert len(rows) == 6 and errors.count(None) == 4 and errors.count(told) == 2
    assert told in output and list(tables(rows))


def test_ranks_that_are_wrong_are_told(monkeypatch, tmp_path):
    monkeypatch.setitem(command.LIMITS, "float32", 1e-12)
    more = ["--tokens", "256", "--only", "causal 256"]
    output, rows = bench("cpu", tmp_path / "rows.jsonl", *more, exit_code=1)
    assert all("WRONG: ranks are" in row["error"] and row["results"] for row in rows)
    assert "WRONG" in output


def test_the_commit_can_be_given_where_there_is_no_git(monkeypatch):
    monkeypatch.setattr(command, "source_commit", lambda: {"commit": None, "dirty": None})
    assert command._source("abc") == {"commit": "abc", "dirty": None}
    assert command._source(None) == {"commit": None, "dirty": None}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--device", "cuda"], "device cuda must be one that torch finds here, ['cpu']"),
        ([], "give either --calibrate or --device"),
        (["--device", "cpu", "--calibrate"], "give either --calibrate or --device"),
        (["--device", "cpu", "--tokens", "3"], "3 is not in the range"),
        (["--device", "cpu", "--only", "1M"], "only must be a part of one of 'causal "),
        (["--device", "cpu", "--commit", "abc"], "commit must be that of the checkout"),
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
        assert row["results"]["peak_bytes"] > 0 and row["versions"]["driver"]
