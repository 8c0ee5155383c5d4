"""Plans: fast, right where they can be checked, and clear about what cannot be."""

import json
import time
from dataclasses import replace

import pytest
from click.testing import CliRunner

from nnscaler_ring.core.exchange import EXCHANGES, Program
from nnscaler_ring.core.exchange.program import Compute, Post
from nnscaler_ring.core.plan.layout import LAYOUTS
from nnscaler_ring.core.plan.schedule import CAUSAL, FULL, Mask, Schedule, Window
from nnscaler_ring.simulator import SimulatedCall, Sizes
from nnscaler_ring.simulator.alike_schedule import AlikeSchedule
from nnscaler_ring.simulator.cluster import cluster_names, load_cluster
from nnscaler_ring.simulator.memory import KernelTraits, predict_memory
from nnscaler_ring.simulator.planner import ONE_MESSAGE, Job, gigabytes, plan
from nnscaler_ring.tools.commands import commands
from nnscaler_ring.tools.commands.plan import parse_mask

BILLION = 10**9
GQA = Sizes(32, 8, 128, 128, "bfloat16")
H200 = load_cluster("h200")


def job(**changes: object) -> Job:
    values = {"tokens": 4096, "ranks": 4, "layers": 2, "sizes": GQA, "mask": CAUSAL}
    return Job(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("mask", [CAUSAL, FULL, Window(4096, 0)], ids=str)
def test_a_billion_tokens_on_a_thousand_ranks_in_no_time(mask: Mask) -> None:
    start = time.process_time()
    result = plan(job(tokens=BILLION, ranks=1000, layers=32, mask=mask), H200)
    seconds = time.process_time() - start
    assert len(result.strategies) == 2 * len(EXCHANGES)
    # 0.1 s a strategy here; twice that on a busy machine.
    assert seconds < 1.5 / 6 * len(result.strategies)
    shares = {s.exchange: s.total_memory for s in result.strategies if s.layout == "zigzag"}
    # Keys and values of 10^9 tokens are 4 TB: nobody holds them but all_gather.
    assert shares["all_gather"] > BILLION * 2 * 8 * 128 * 2
    assert shares["direct"] < shares["ring"] < shares["all_gather"] / 5


def planned(call: SimulatedCall, rank: int) -> Program:
    """As the planner has it made."""
    schedule = AlikeSchedule(call.schedule, rank)
    return EXCHANGES[call.exchange].program(schedule, rank, ONE_MESSAGE)


def pairs_of(program: Program) -> int:
    computed = [action for action in program.forward if isinstance(action, Compute)]
    return sum(tile.pairs() for action in computed for tile in action.tiles)


def rows_of(program: Program) -> tuple[int, int]:
    """In and out."""
    posts = [action for action in program.forward if isinstance(action, Post)]
    rows_in = sum(message.length for post in posts for message in post.receives)
    return rows_in, sum(message.length for post in posts for message in post.sends)


def test_work_is_that_of_the_whole_matrix() -> None:
    """FLOPs come from the tiles: all ranks together compute every visible pair once."""
    for layout in ("contiguous", "zigzag", "striped"):
        for mask in (CAUSAL, FULL, Window(100, 7)):
            call = SimulatedCall(1003, 5, GQA, mask, layout)
            pairs = sum(pairs_of(call.program(rank)) for rank in range(5))
            whole = Schedule(*[LAYOUTS[layout].for_shards([1003])] * 2, mask).tiles(0, (0,))
            assert pairs == sum(tile.pairs() for tile in whole)
            short = sum(pairs_of(planned(call, rank)) for rank in range(5))
            assert short == pytest.approx(pairs, rel=2e-3)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("mask", [CAUSAL, FULL, Window(700, 0), Window(700, 300)], ids=str)
def test_alike_distances_are_alike(layout: str, mask: Mask) -> None:
    """The shortcut of plans finds the same work and rows as going through every message."""
    call = SimulatedCall(32_000, 40, GQA, mask, layout)
    for rank in (0, 17, 39):
        exact, short = call.program(rank), planned(call, rank)
        assert pairs_of(short) == pytest.approx(pairs_of(exact), rel=2e-3)
        assert AlikeSchedule(call.schedule, rank).visible_pairs() == pairs_of(short)
        for ours, theirs in zip(rows_of(short), rows_of(exact), strict=True):
            assert ours == pytest.approx(theirs, rel=2e-3)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("exchange", ["direct", "ring"])
@pytest.mark.parametrize("mask", [CAUSAL, Window(3000, 0)], ids=str)
def test_memory_of_few_ranks_stands_for_many(layout: str, exchange: str, mask: Mask) -> None:
    """Note [A plan's shortcuts]: against the ledger over all 24 ranks."""
    wanted = job(tokens=24 * 8192, ranks=24, layers=1, mask=mask)
    plans = plan(wanted, H200).strategies
    chosen = next(s for s in plans if (s.layout, s.exchange) == (layout, exchange))
    call = wanted.call(layout, exchange, tokens=wanted.tokens, ranks=24)
    exact = max(
        predict_memory(call, rank, KernelTraits(), backward=True).total for rank in range(24)
    )
    assert chosen.total_memory == pytest.approx(exact, rel=0.05)


def test_sent_bytes_are_those_of_the_real_plan() -> None:
    wanted = job(tokens=8192, ranks=8)
    for strategy in plan(wanted, H200).strategies:
        call = wanted.call(strategy.layout, strategy.exchange, tokens=8192, ranks=8)
        exact = max(
            GQA.sent_bytes(
                EXCHANGES[strategy.exchange].program(call.schedule, rank).sent()
            ).total_bytes
            for rank in (0, 4, 7)
        )
        assert strategy.sent.total_bytes == exact, strategy


def test_smallest_number_of_ranks_is_the_smallest() -> None:
    wanted = job(tokens=3_000_000, ranks=1, layers=4)
    smallest = {(s.layout, s.exchange): s.smallest_ranks for s in plan(wanted, H200).strategies}
    for key, ranks in smallest.items():
        if key[0] == "contiguous":
            continue
        if ranks is None:
            assert key[1] == "all_gather"
            continue
        for number, fits in ((ranks, True), (ranks - 1, False)):
            if number:
                again = plan(replace(wanted, ranks=number), H200).strategies
                assert next(s for s in again if (s.layout, s.exchange) == key).fits is fits


def test_recommends_balance_for_causal_and_neighbours_for_windows() -> None:
    causal = plan(job(tokens=1 << 20, ranks=8), H200).recommended
    assert causal is not None
    assert (causal.layout, causal.exchange) == ("zigzag", "direct")
    window = plan(job(tokens=1 << 20, ranks=8, mask=Window(4096, 0)), H200)
    assert window.recommended is not None
    assert window.recommended.exchange == "direct"
    by_name = {s.exchange: s for s in window.strategies if s.layout == "contiguous"}
    direct, ring = by_name["direct"], by_name["ring"]
    assert ring.sent.total_bytes > 10 * direct.sent.total_bytes


def test_says_why_nothing_fits() -> None:
    result = plan(job(tokens=BILLION, ranks=100, layers=32), H200)
    assert result.recommended is None
    assert result.advice.startswith("Nothing fits: use at least ")
    assert all("per rank, has 141 GB" in s.reason for s in result.strategies)


def test_forward_only_keeps_nothing_and_recompute_little() -> None:
    def memory(**changes: object) -> int:
        return plan(job(layers=10, tokens=40_960, **changes), H200).strategies[0].total_memory

    assert memory(backward=False) < memory(recompute=True) < memory()


@pytest.mark.parametrize("name", cluster_names())
def test_presets_are_whole(name: str) -> None:
    cluster = load_cluster(name)
    sizes = replace(GQA, dtype="float32")
    assert plan(job(sizes=sizes), cluster).recommended is not None
    assert len(cluster.source) > 40


def test_sizes_for_people() -> None:
    figures = (5, 1500, 999_600, 141e9, 999.6e9, 21.2e12)
    assert [gigabytes(n) for n in figures] == [
        "5 B",
        "1.5 kB",
        "1 MB",
        "141 GB",
        "1 TB",
        "21.2 TB",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("causal", (True, (-1, -1))),
        ("full", (False, (-1, -1))),
        ("causal:4096", (True, (4096, -1))),
        ("512:128", (False, (512, 128))),
        ("-1:128", (False, (-1, 128))),
    ],
)
def test_masks_of_the_command_line(text: str, expected: tuple[bool, tuple[int, int]]) -> None:
    assert parse_mask(text) == expected


def test_command_prints_json_alone() -> None:
    arguments = "plan --tokens 1000000000 --ranks 1000 --heads 32 --kv-heads 8 --json"
    result = CliRunner().invoke(commands, arguments.split())
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert len(figures["strategies"]) == 2 * len(EXCHANGES)
    assert figures["recommended"]["seconds"] > 0


def test_command_prints_a_table() -> None:
    arguments = "plan --tokens 1000000 --ranks 8 --kv-heads 8 --memory-gb 80 --link-gb 100"
    result = CliRunner().invoke(commands, arguments.split())
    assert result.exit_code == 0, result.output
    for text in ("zigzag", "all_gather", "exchange='direct'", "Changed: memory_bytes, inside"):
        assert text in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tokens 8 --ranks 0", "ranks must be 1 to"),
        ("--tokens 0 --ranks 1", "tokens must be at least ranks=1"),
        ("--tokens 3 --ranks 5", "use fewer ranks"),
        ("--tokens 8 --ranks 1 --memory-gb 0.0000001", "memory must hold at least one token"),
        ("--tokens 8 --ranks 1 --memory-gb -1", "memory_bytes of a cluster must be above 0"),
        ("--tokens 8 --ranks 1 --heads 5 --kv-heads 2", "num_kv_heads must divide"),
        ("--tokens 8 --ranks 1 --dtype int8", "dtype must be one of"),
        ("--tokens 8 --ranks 1 --device nothing", "device must be one of"),
        ("--tokens 8 --ranks 1 --mask diagonal", "mask must be causal, full"),
        ("--tokens 8 --ranks 1 --mask causal:-7", "window_size entries must be"),
        ("--tokens 8 --ranks 1 --layers 0", "layers must be at least 1"),
        ("--tokens 8 --ranks 1 --head-dim 0", "head_dim must be at least 1"),
    ],
)
def test_nonsense_is_refused_with_exit_code_2(arguments: str, message: str) -> None:
    result = CliRunner().invoke(commands, ["plan", *arguments.split()])
    assert result.exit_code == 2
    # click wraps nothing, but rich may not be there at all: one line says it.
    assert message in result.stderr


def test_a_file_that_is_no_cluster_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "mine.json"
    path.write_text('{"name": "x"}')
    with pytest.raises(ValueError, match="is not a cluster's file"):
        load_cluster(str(path))
