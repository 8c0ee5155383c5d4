"""The command line: what it prints, and how it fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from nnscaler_ring.core.exchange import EXCHANGES
from nnscaler_ring.core.kernels import KERNELS
from nnscaler_ring.tools import check
from nnscaler_ring.tools.commands import check as check_command
from nnscaler_ring.tools.commands import commands
from nnscaler_ring.tools.launch import RankError

ROOT = Path(__file__).parents[2]
CALLS = 27 * len(EXCHANGES)  # of `check --quick`


def run(*args: str):
    return CliRunner().invoke(commands, args)


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, text=True, capture_output=True, timeout=180, check=False
    )


def test_info_as_json():
    done = python("-m", "nnscaler_ring", "info", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    assert facts["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert "gloo" in facts["devices"]["backends"]
    for row in facts["kernels"]:
        assert set(row["refusals"]) == set(KERNELS)
        assert row["auto"] is None or row["refusals"][row["auto"]] is None
        can = [name for name in row["asked"] if row["refusals"][name] is None]
        assert row["auto"] == (can[0] if can else None)
    assert {(row["dtype"], row["head_dim"]) for row in facts["kernels"]} == {
        (dtype, head_dim) for dtype in ("float32", "bfloat16") for head_dim in (64, 128)
    }


def test_info_as_a_table():
    done = run("info")
    assert done.exit_code == 0
    assert torch.__version__ in done.output
    assert all(name in done.output for name in KERNELS)
    assert "auto asks cpu_tiles, torch_cpu, flash_attn_3, torch_cuda, and" in done.output


def test_missing_packages_are_one_line():
    program = (
        "import sys\n"
        "from nnscaler_ring.tools.cli import NEEDED, main\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == self.name:\n"
        "            raise ModuleNotFoundError('blocked', name=name)\n"
        "sys.meta_path.insert(0, missing := Missing())\n"
        "for missing.name in NEEDED:\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as end:\n"
        "        print(end.code)\n"
    )
    done = python("-c", program)
    assert done.stderr.splitlines() == [
        f"nnscaler-ring needs {name}: pip install 'nnscaler_ring[cli]'"
        for name in ("click", "rich")
    ]
    assert done.stdout == "2\n2\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nonsense"], "No such command"),
        (["check", "--ranks", "0"], "0 is not in the range"),
        (["check", "--device", "tpu"], "'tpu' is not one of"),
        (["check", "--ranks", "64", "--device", "cuda"], "on cuda need"),
        (["demo", "--op", "nonsense"], "'nonsense' is not one of"),
        (["demo", "--steps", "0"], "0 is not in the range"),
        (["demo", "--text", "missing.txt"], "does not exist"),
        (["demo", "--text", "{tmp}/short.txt"], "text must be longer than a sequence of 2048"),
        (["demo", "--text", "{tmp}/empty.txt"], "text must hold at least two bytes"),
        (["demo", "--out", "{tmp}/short.txt"], "is a file"),
        (["demo", "--out", "{tmp}/short.txt/below"], "Not a directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_user_errors_are_told_without_a_traceback(tmp_path, args, message):
    (tmp_path / "short.txt").write_text("to be or not to be\n")
    (tmp_path / "empty.txt").write_text("\n")
    done = run(*(arg.format(tmp=tmp_path) for arg in args))
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert "Traceback" not in done.output


def test_check_quick_passes():
    done = run("check", "--quick")
    assert done.exit_code == 0, done.output
    assert f"All {CALLS} calls over 2 ranks equal dense attention" in " ".join(done.output.split())
    for op in check.OPS:
        assert op in done.output


def test_check_with_a_wrong_result_fails(monkeypatch):
    def off(cases, **options):
        return {case: 1.0 if n == 5 else 0.0 for n, case in enumerate(cases)}

    monkeypatch.setattr(check_command, "run_cases", off)
    done = run("check", "--quick")
    assert done.exit_code == 1
    assert f"1 of {CALLS} calls are off" in done.output
    assert done.output.count("WRONG") == 1
    assert "1.0e+00" in done.output


def test_check_with_a_failing_rank_shows_its_traceback(monkeypatch):
    def fail(cases, **options):
        raise RankError("rank 1 raised:\nTraceback of rank 1")

    monkeypatch.setattr(check_command, "run_cases", fail)
    done = run("check", "--quick")
    assert done.exit_code == 1
    assert "Traceback of rank 1" in done.output
    assert "launch.py" not in done.output
