"""What the benchmarks report is what they measured."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import harness, memory, rows, sent_bytes, speed, table
from benchmarks.processes import Processes, Worker, WorkerError
from benchmarks.work import OPS, Work, context_parallel, gather, held_tokens, layout_of, sdpa
from nnscaler_ring.core.plan.layout import PackedDocuments, SequenceLayout
from nnscaler_ring.core.plan.schedule import Schedule, Window, row_count

MIB = 2**20


class FakeProcesses:
    """Notes what is asked for; the n-th timed run takes n seconds on its slower rank."""

    size, threads = 2, 1

    def __init__(self) -> None:
        self.timed: list[str] = []

    def call(self, function, *args):
        if function is not harness.time_once:
            return [[], []]
        self.timed.append(args[0])
        return [(10.0, 10.0 + len(self.timed)), (10.5, 10.5)]


def test_runs_are_interleaved_and_the_warm_up_does_not_count(monkeypatch):
    monkeypatch.setattr(harness, "PAUSE_SECONDS", 0)
    fake, steps = FakeProcesses(), []
    contestants = [harness.Contestant(name, fake, sdpa) for name in "ABC"]
    measured = harness.measure(contestants, reps=2, advance=lambda: steps.append(None))
    assert "".join(fake.timed) == "ABCABCABC"
    assert {name: samples for name, (samples, _) in measured.items()} == {
        "A": [4.0, 7.0],
        "B": [5.0, 8.0],
        "C": [6.0, 9.0],
    }
    assert len(steps) == harness.rounds(3, reps=2)


def test_kept_fraction_is_baseline_over_ours():
    kept = harness.kept_fraction([1.0, 2.0, 3.0], [2.0, 2.0, 4.0])
    assert kept == {
        "of_medians": 1.0,
        "by_round_median": 0.75,
        "by_round_min": 0.5,
        "by_round_max": 1.0,
    }


def test_a_row_is_whole_and_survives_its_file(tmp_path: Path):
    row = rows.make_row("speed", "x", {"tokens": 1}, samples=[3.0, 1.0, 2.0], results={"a": 1})
    assert row["seconds"] == {
        "median": 2.0,
        "min": 1.0,
        "max": 3.0,
        "quartile_1": 1.5,
        "quartile_3": 2.5,
    }
    assert row["samples"] == [3.0, 1.0, 2.0]
    for name in ("device", "versions", "commit", "dirty", "command", "date"):
        assert name in row, name
    rows.write_rows(tmp_path / "rows.jsonl", [row])
    rows.write_rows(tmp_path / "rows.jsonl", [row])
    assert rows.read_rows(tmp_path / "rows.jsonl") == json.loads(json.dumps([row, row]))


@torch.library.custom_op("nnscaler_ring_benchmarks::known_memory", mutates_args=())
def known_memory(x: Tensor) -> Tensor:
    """Holds 10 MiB, lets them go, then holds 4 + 3 MiB: the peak is 10 MiB beside the result."""
    first = torch.empty(10 * MIB, dtype=torch.uint8)
    del first
    both = [torch.empty(n * MIB, dtype=torch.uint8) for n in (4, 3)]
    del both
    return torch.empty_like(x)


def test_live_bytes_inside_an_op_are_counted():
    before = torch.zeros(5 * MIB, dtype=torch.uint8)  # was there before, so it does not count

    def run():
        x = torch.zeros(MIB, dtype=torch.uint8)
        return [known_memory(x), before[:0].clone()]

    # x, 10 MiB in the op; then x and the result. The profiler sees tensors that an op makes.
    assert memory.count_live_bytes(run) == memory.Counted(11 * MIB, 11 * MIB, 0, 0)


def test_gradients_and_what_is_left_over_are_told_apart():
    kept = []

    def run():
        kept.append(torch.empty(2 * MIB, dtype=torch.uint8))
        return [torch.empty(n * MIB, dtype=torch.uint8) for n in (1, 3, 3)]

    assert memory.count_live_bytes(run) == memory.Counted(7 * MIB, 9 * MIB, 6 * MIB, 2 * MIB)


def test_peak_rss_sees_memory_that_is_gone_again():
    def run():
        torch.ones(64 * MIB, dtype=torch.uint8)

    # The kernel keeps its counters per thread, a few pages off.
    assert 63 * MIB <= memory.peak_rss_bytes(run) < 68 * MIB


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "work",
    [
        Work(24, 1, 1),
        Work(24, 1, 1, causal=False),
        Work(24, 1, 1, window=3),
        Work(24, 1, 1, documents=5),
    ],
    ids=lambda work: work.mask,
)
def test_the_lower_bound_agrees_with_the_schedule(op: str, work: Work):
    layout: SequenceLayout = layout_of(OPS[op].compute_layout, 24, 3)
    if work.documents > 1:
        cu = tuple(work.cu_seqlens().tolist())
        layout = PackedDocuments(layout, cu, cu)
    mask = Window.from_window(work.causal, (-1 if work.window is None else work.window, -1))
    schedule = Schedule(layout, layout, mask)
    row_bytes = 2 * 64 * 4
    assert sent_bytes.needed_bytes(work, op, 3) == [
        [
            row_bytes * row_count(schedule.needed_rows(reader, owner)) if owner != reader else 0
            for owner in range(3)
        ]
        for reader in range(3)
    ]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_gather_puts_every_token_in_its_place(layout: str):
    whole = torch.arange(24).view(1, 24, 1, 1)
    positions = [held_tokens(layout_of(layout, 24, 3), rank) for rank in range(3)]
    (gathered,) = gather([[whole[:, held]] for held in positions], positions)
    assert torch.equal(gathered, whole)


def test_documents_fill_the_tokens_and_none_is_empty():
    lengths = Work(100, 1, 1, documents=64).lengths()
    assert len(lengths) == 64 and sum(lengths) == 100 and min(lengths) >= 1


def test_every_part_has_a_table():
    worst = {
        "counted_at_least": 8.0,
        "counted": 9.0,
        "gradient": 3.0,
        "rss_mmap": 9.5,
        "rss_default": 12.0,
    }
    by_rank = [{"counted_bytes": 9 * MIB}]
    memory_row = rows.make_row(
        "memory",
        "way",
        {"work": "w", "processes": 2},
        results={"worst_rank_in_local_q": worst, "by_rank": by_rank},
    )
    failed = rows.make_row("peers", "peer", {"work": "w"}, error="TypeError: a | b")
    rendered = [one.markdown() for one in table.tables([memory_row, failed])]
    assert "| way | 2 | 8.0-9.0 (5.0-6.0) | 9.5 (6.5) | 12.0 (9.0) | 9 |" in rendered[0]
    assert "| peer | - | - | TypeError: a \\| b | - |" in rendered[1]
    assert len(list(table.provenance([memory_row, failed]))) == 1


def fail_on_rank_1(worker: Worker) -> None:
    if worker.rank == 1:
        raise ValueError("here")
    torch.distributed.barrier()  # never comes back: rank 1 is not there


@pytest.mark.slow
def test_ranks_compute_the_work_and_failures_are_told():
    with Processes(2) as ranks, Processes(1) as single:
        work = Work(64, 2, 2, documents=3)
        where = speed.Where(ranks, single)
        contestants = speed.contestants_of(work, where)
        measured = harness.measure(contestants, reps=1)
        made = [speed._row(work, one, contestants, measured, None) for one in contestants]
        for row in made[1:]:
            assert max(row["results"]["relative_l2_to_baseline"].values()) < 1e-5
            assert row["seconds"]["median"] > 0
        assert [line[0] for line in next(table.tables(made)).lines] == [x.name for x in contestants]
        with pytest.raises(WorkerError, match="here") as failure:
            ranks.call(fail_on_rank_1)
        assert failure.value.cause == "ValueError: here"


def test_one_worker_needs_no_group():
    work = Work(16, 2, 2)
    alone = Worker(0, 1)
    ours, theirs = context_parallel(alone, work, "ring", "direct")(), sdpa(alone, work)()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
