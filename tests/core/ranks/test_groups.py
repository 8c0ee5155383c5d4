"""Groups: any ranks in any order, made by their members alone, once; wrong ones are refused."""

import gc
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh

from nnscaler_ring import (
    set_agreement_timeout,
    traffic,
    wrap_ring_attn_func,
    wrap_ring_attn_varlen_func,
    wrap_zigzag_attn_func,
    zigzag_positions,
    zigzag_shard,
    zigzag_unshard,
)
from nnscaler_ring.core.ranks import groups
from nnscaler_ring.core.ranks.groups import (
    find_place,
    group_of,
    group_state,
    group_string,
    group_timeout,
)
from tests.core.attempts import Attempt, arguments, attempt, check_correct_call, warm_up
from tests.oracle import make_qkv
from tests.ranks import run_fresh

RING, ZIGZAG, VARLEN = wrap_ring_attn_func, wrap_zigzag_attn_func, wrap_ring_attn_varlen_func

FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "wrap_ring_attn_func": lambda g: RING(**arguments(RING), process_group=g),
    "wrap_zigzag_attn_func": lambda g: ZIGZAG(**arguments(ZIGZAG), process_group=g),
    "wrap_ring_attn_varlen_func": lambda g: VARLEN(**arguments(VARLEN), process_group=g),
    "zigzag_shard": lambda g: zigzag_shard(torch.zeros(1, 4), g),
    "zigzag_unshard": lambda g: zigzag_unshard(torch.zeros(1, 4), g),
    "zigzag_positions": lambda g: zigzag_positions(8, g),
    "traffic": traffic,
    "set_agreement_timeout": lambda g: set_agreement_timeout(g, 3.0),
}

# What rank 2 of 4 passes, and what it is told.
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "text": (
        lambda: "0",
        "TypeError: process_group must be None, a sequence of global ranks, a ProcessGroup or a "
        "DeviceMesh, got str",
    ),
    "one rank": (lambda: 2, "TypeError: process_group must be .*, got int"),
    "a set, which has no order": (lambda: {0, 2}, "TypeError: process_group must be .*, got set"),
    "floats": (lambda: [0.0, 2.0], r"TypeError: process_group must hold global ranks.*\[0.0, 2.0"),
    "texts": (lambda: ["2"], r"TypeError: process_group must hold global ranks, ints, got \['2'\]"),
    "no rank": (lambda: [], r"ValueError: process_group must name at least one rank, got \[\]"),
    "a rank above the world": (
        lambda: [2, 4],
        r"ValueError: process_group must hold ranks of the world, 0 to 3, got \[2, 4\]",
    ),
    "a negative rank": (lambda: [-1, 2], r"ValueError: .* ranks of the world, 0 to 3, got \[-1, 2"),
    "a rank twice": (
        lambda: [2, 0, 2],
        r"ValueError: process_group must not repeat a rank, got \[2, 0, 2\]",
    ),
    "not this rank": (
        lambda: [0, 1],
        r"ValueError: process_group must hold this rank, 2, got \[0, 1\]; call the op on the ranks "
        "of its group only",
    ),
    "what new_group gives to others": (
        lambda: dist.GroupMember.NON_GROUP_MEMBER,
        "ValueError: process_group must hold this rank, 2, got what new_group.. gives to ranks "
        "outside the group",
    ),
    "a mesh without this rank": (
        lambda: DeviceMesh("cpu", [0, 1], _init_backend=False),
        "ValueError: process_group must hold this rank, 2, got DeviceMesh",
    ),
    "a mesh of three dimensions": (
        lambda: DeviceMesh("cpu", [[[0], [1]], [[2], [3]]], _init_backend=False),
        "ValueError: process_group as a DeviceMesh must have one dimension here, got DeviceMesh.*; "
        r"pass mesh\['name_of_the_sequence_dimension'\]",
    ),
}


def wrong_groups() -> dict[str, Attempt]:
    return {
        f"{name}, {wrong}": attempt(lambda: function(make()))  # noqa: B023
        for name, function in FUNCTIONS.items()
        for wrong, (make, _) in WRONG.items()
    }


def check_order(process_group: Any, order: list[int]) -> None:
    """Causal attention, where the order of blocks matters, equals one device."""
    q, k, v = make_qkv(1, 1, 3 * len(order), 3 * len(order), 2, 1, 4)
    block = order.index(dist.get_rank())
    mine = slice(3 * block, 3 * block + 3)
    out = RING(q[:, mine], k[:, mine], v[:, mine], process_group=process_group)
    torch.testing.assert_close(out, RING(q, k, v)[:, mine])
    place = find_place(group_string(process_group))
    assert place.block == block and [place.global_rank(n) for n in range(len(order))] == order


def groups_made() -> int:
    return len(c10d._world.pg_map)


def ranks_that_have_different_numbers_of_groups(me: int) -> None:
    """torch's own new_group(use_local_synchronization=True) waits forever in the last of these."""
    before = groups_made()
    for pair in ([0, 1], [1, 2], [1, 3]):
        if me in pair:
            check_order(pair, pair)
    assert groups_made() - before == {0: 1, 1: 3, 2: 1, 3: 1}[me]
    for strided in ([0, 2], [1, 3]):
        if me in strided:
            check_order(strided, strided)
    if me != 3:
        check_order([2, 0, 1], [2, 0, 1])


def one_group_for_the_same_ranks(me: int) -> None:
    if me in (0, 2):
        string = group_string([0, 2])
        made = groups_made()
        for same in ((0, 2), range(0, 3, 2), torch.tensor([0, 2]), iter([0, 2])):
            assert group_string(same) == string, same
        check_order([2, 0], [2, 0])
        assert group_string([2, 0]) == f"{string}:1,0"
        assert group_of(group_string([2, 0])) is group_of(string)
        assert groups_made() == made
    made = groups_made()
    check_order([3, 1, 0, 2], [3, 1, 0, 2])
    assert group_of(group_string([3, 1, 0, 2])) is dist.group.WORLD
    assert groups_made() == made


def groups_of_torch() -> None:
    check_order(dist.group.WORLD, [0, 1, 2, 3])
    process_group = dist.new_group([3, 1, 0])
    if dist.get_rank() != 2:
        check_order(process_group, [0, 1, 3])
    check_order(DeviceMesh("cpu", [0, 1, 2, 3]), [0, 1, 2, 3])
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("data", "sequence"))
    me = dist.get_rank()
    check_order(mesh["sequence"], [me // 2 * 2, me // 2 * 2 + 1])
    check_order(mesh["data"], [me % 2, me % 2 + 2])


def a_group_of_a_world_that_is_bound_to_a_gpu(me: int) -> None:
    """As after init_process_group(device_id=...): torch would split the group off the world, in
    which only the members are here."""
    if me in (1, 2):
        return
    world, device = dist.group.WORLD, torch.device("cuda", 0)
    splits: list[Any] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(c10d, "_get_split_source", splits.append)
        world.bound_device_id = device
        try:
            group_string([3, 0])
            assert not splits and world.bound_device_id == device
        finally:
            world.bound_device_id = None
    check_order([3, 0], [3, 0])


def groups_inherit(me: int, seconds: float) -> None:
    """Groups made from ranks are like the default group."""
    set_agreement_timeout(dist.group.WORLD, 22.0)
    if me != 2:
        string = group_string([0, 1, 3])
        assert group_timeout(group_of(string)) == timedelta(seconds=seconds), string
        assert dist.get_backend(group_of(string)) == dist.get_backend() == "gloo"
        assert group_state(string).agreement_seconds == 22.0


def groups_of_four(ranks: list[int], seconds: float, again: str) -> dict[str, Attempt]:
    """The scenarios on one rank, in one world of 4 and then in another."""
    me = dist.get_rank()
    warm_up()
    set_agreement_timeout(dist.group.WORLD, 20.0)  # the machine may be busy
    ranks_that_have_different_numbers_of_groups(me)
    one_group_for_the_same_ranks(me)
    groups_of_torch()
    a_group_of_a_world_that_is_bound_to_a_gpu(me)
    groups_inherit(me, seconds)
    found = wrong_groups() if me == 2 else {}

    dist.barrier()
    string = group_string([me])
    dist.destroy_process_group()
    with pytest.raises(ValueError, match=r"process_group=\[0, 1\] needs torch.distributed; call"):
        group_string([0, 1])
    with pytest.raises(ValueError, match="process_group .* must be alive, but was destroyed"):
        group_of(string)
    dist.init_process_group("gloo", init_method=again, rank=me, world_size=4)
    set_agreement_timeout(dist.group.WORLD, 20.0)
    ranks_that_have_different_numbers_of_groups(me)
    one_group_for_the_same_ranks(me)
    gc.collect()
    # torch itself keeps a destroyed world: as a default argument, in modules imported meanwhile.
    dead = set(groups._STATES) - set(c10d._world.pg_map)
    assert len(dead) <= 1 and all(group.size() == 4 for group in dead), dead
    return found


@pytest.mark.parametrize("init", [pytest.param("file", marks=pytest.mark.full), "tcp"])
def test_groups_of_all_kinds(init, tmp_path):
    again = f"file://{tmp_path}/store"
    outcomes = run_fresh(4, groups_of_four, 23.0, again, init=init, timeout_seconds=23.0)
    assert [outcome.kind for outcome in outcomes] == ["result"] * 4, [
        outcome.describe() for outcome in outcomes
    ]
    for name, end in outcomes[2].value.items():
        error, _, message = WRONG[name.partition(", ")[2]][1].partition(": ")
        assert end.error == error and re.search(message, end.message), (name, end)
        assert end.seconds < 1.0, (name, end)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("ranks", [[0], [0, 1], []], ids=str)
def test_ranks_need_torch_distributed(name, ranks):
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match=r"process_group=\[.*\] needs torch.distributed; call"):
        FUNCTIONS[name](ranks)


@pytest.mark.parametrize(
    ("group", "seconds", "error", "message"),
    [
        (None, 3.0, ValueError, "process_group must be a group, got None: one device waits for"),
        ([0], "3", TypeError, "seconds must be a number, got '3'"),
        ([0], True, TypeError, "seconds must be a number, got True"),
        ([0], 0, ValueError, "seconds must be > 0, got 0"),
        ([0], float("nan"), ValueError, "seconds must be > 0, got nan"),
    ],
)
def test_wrong_agreement_timeouts_are_refused(group, seconds, error, message):
    with pytest.raises(error, match=message):
        set_agreement_timeout(group, seconds)


# Ranks that pass different groups.


def different_members(ranks: list[int], seconds: float | None) -> dict[str, Attempt]:
    """Rank 0 passes itself and rank 1, which passes the world of 3 like rank 2."""
    warm_up()
    everyone = dist.group.WORLD
    if seconds is not None:
        set_agreement_timeout(everyone, seconds)
    dist.barrier()
    mine = [0, 1] if dist.get_rank() == 0 else [0, 1, 2]
    found = {"first": attempt(lambda: RING(**arguments(RING), process_group=mine), everyone)}
    dist.barrier()
    if dist.get_rank() == 0:  # its first call of this group is the one that the others gave up
        found["late"] = attempt(lambda: RING(**arguments(RING), process_group=[0, 1, 2]), everyone)
    set_agreement_timeout(everyone, 20.0)
    check_correct_call([0, 1, 2], 0.1)
    if dist.get_rank() != 2:
        check_correct_call([0, 1], 0.1)
    return found


@pytest.mark.parametrize(
    ("init", "seconds"), [pytest.param("file", None, marks=pytest.mark.full), ("tcp", 1.5)]
)
def test_ranks_that_pass_different_groups_are_told_who_asked_for_what(init, seconds):
    outcomes = run_fresh(3, different_members, seconds, init=init, timeout_seconds=10.0)
    assert [outcome.kind for outcome in outcomes] == ["result"] * 3, [
        outcome.describe() for outcome in outcomes
    ]
    bound = 10.0 if seconds is None else seconds  # None: the group's timeout
    ends = [outcome.value["first"] for outcome in outcomes]
    assert "rank(s) [0] to compare a new plan" in outcomes[0].value["late"].message, outcomes[0]
    assert all(bound - 0.1 < end.seconds < bound + 1.5 and end.sent == 0 for end in ends), ends
    assert ends[0].error == "ValueError" and ends[0].message.startswith(
        "process_group must be the same on all its ranks: rank 0 asks for [0, 1], but rank(s) [1] "
        f"did not within {bound:g} s (rank 1 last asked for process_group=[0, 1, 2]); if ranks "
        "start far apart, raise the bound with"
    ), ends[0]
    for end in ends[1:]:
        assert end.error == "DisagreementError", end
        assert re.search(
            rf"rank [12] waited {bound:g} s for rank\(s\) \[0\] to compare a new plan "
            r"\(rank 0 last asked for process_group=\[0, 1\]\)",
            end.message,
        ), end
