"""Spawned local ranks: results, reports, and that a failure ends and names everything."""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nnscaler_ring.tools.launch import Rank, RankError, check_ranks, run_ranks


def sum_of_ranks(rank: Rank, factor: int) -> tuple[int, float, int, str]:
    total = torch.tensor(float(factor * rank.rank), device=rank.device)
    dist.all_reduce(total)
    for number in range(3):
        rank.report(number)
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
    return rank.rank, total.item(), torch.get_num_threads(), interface


def raise_on_rank_1(rank: Rank) -> None:
    if rank.rank == 1:
        raise ArithmeticError("rank 1 has had enough")
    dist.barrier()


def die_on_rank_1(rank: Rank) -> None:
    if rank.rank == 1:
        os._exit(3)
    dist.barrier()


def print_pid_and_sleep(rank: Rank) -> None:
    rank.report(os.getpid())
    time.sleep(600)


def test_results_and_reports_of_every_rank(monkeypatch):
    before = set(multiprocessing.active_children())
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    reports: dict[int, list[int]] = {0: [], 1: [], 2: []}
    results = run_ranks(
        3, sum_of_ranks, 10, on_report=lambda rank, value: reports[rank].append(value)
    )
    assert [result[:3] for result in results] == [(rank, 30.0, 1) for rank in range(3)]
    assert {result[3] for result in results} <= {"lo", "lo0", ""}
    assert reports == {rank: [0, 1, 2] for rank in range(3)}
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (
            raise_on_rank_1,
            r"rank 1 raised:\nTraceback(.|\n)*ArithmeticError: rank 1 has had enough",
        ),
        (die_on_rank_1, "rank 1 died: exit code 3"),
    ],
)
def test_a_failing_rank_is_shown_and_the_others_end(fn, message):
    before = set(multiprocessing.active_children())
    with pytest.raises(RankError, match=message):
        run_ranks(2, fn)
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_ranks_end_with_their_parent(tmp_path):
    program = (
        "from nnscaler_ring.tools.launch import run_ranks\n"
        "from tests.tools.test_launch import print_pid_and_sleep\n"
        "if __name__ == '__main__':\n"
        "    run_ranks(2, print_pid_and_sleep, on_report=lambda r, pid: print(pid, flush=True))\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert parent.stdout is not None
    with parent:
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        parent.kill()
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if is_running(pid)]
    assert not list(tmp_path.iterdir())


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_what_this_machine_cannot_run_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="device must be one of"):
        check_ranks(2, "tpu")
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        run_ranks(0, sum_of_ranks, 1)
    monkeypatch.setattr(dist, "is_backend_available", lambda backend: backend != "nccl")
    with pytest.raises(ValueError, match="this torch has no nccl"):
        check_ranks(1, "cuda")
    monkeypatch.setattr(dist, "is_backend_available", lambda backend: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="one GPU each, got 2 ranks and 1 GPUs"):
        check_ranks(2, "cuda")


@pytest.mark.cuda
def test_ranks_on_cuda():
    assert run_ranks(1, sum_of_ranks, 10, device="cuda")[0][:2] == (0, 0.0)
