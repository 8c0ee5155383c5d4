"""Process groups: what the user gives, the name that an op takes, and messages between blocks.

Note [Block order]
    Position i of the user's list of ranks holds block i of the sequence. `new_group` sorts its
    ranks, so block order and group order may differ: an op gets the group's name and, where they
    differ, the order, as one string `name` or `name:2,0,1`. Ranks become global only inside torch.
"""

from __future__ import annotations

import logging
import operator
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import timedelta
from numbers import Real
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from nnscaler_ring.core.ranks.calls import Calls
from nnscaler_ring.core.ranks.store import STORE_SECONDS, answer_within, wait_for_keys

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from nnscaler_ring.core.ranks.watch import Watch

    ProcessGroupLike = Sequence[int] | dist.ProcessGroup | DeviceMesh

logger = logging.getLogger(__name__)

ALONE = ""
"""The group string of a call without a group: the tensors are the whole sequence."""

WARN_SECONDS = 5.0
"""After how long a rank that waits for others to make a group says so."""

_LATEST_REQUEST = "nnscaler_ring/group_asked_by/"

PLANS_REMEMBERED = 1024
"""Plans per group that need no new agreement, least recently used forgotten first."""


@dataclass
class Traffic:
    """Payload that this rank sent over one process group, in bytes, and the messages it took."""

    forward_kv_bytes: int = 0
    backward_kv_bytes: int = 0
    gradient_bytes: int = 0
    relayout_bytes: int = 0
    seed_bytes: int = 0
    partial_bytes: int = 0
    messages: int = 0

    @property
    def total_bytes(self) -> int:
        """All payload together."""
        return (
            self.forward_kv_bytes
            + self.backward_kv_bytes
            + self.gradient_bytes
            + self.relayout_bytes
            + self.seed_bytes
            + self.partial_bytes
        )

    def __add__(self, other: Traffic) -> Traffic:
        """What was sent in both."""
        names = [f.name for f in fields(self)]
        return Traffic(*(getattr(self, name) + getattr(other, name) for name in names))

    def __sub__(self, earlier: Traffic) -> Traffic:
        """What was sent since an earlier reading."""
        names = [f.name for f in fields(self)]
        return Traffic(*(getattr(self, name) - getattr(earlier, name) for name in names))

    def copy(self) -> Traffic:
        """A reading that later traffic does not change."""
        return self - Traffic()


@dataclass
class GroupState:
    """What a process remembers of one process group for as long as the group lives.

    `connected`: the device types whose tensors its ranks are ready to exchange. `agreements`: how
    often plans were compared. `agreement_seconds`: how long at most; None: the group's timeout.
    `patient`: a client of the group's store for long waits. `lost`: ranks that are known to be
    lost; of the default group's state, for all groups. `places`: by group string, who holds which
    block, and this rank's.
    """

    traffic: Traffic = field(default_factory=Traffic)
    connected: set[str] = field(default_factory=set)
    agreements: int = 0
    agreed_plans: OrderedDict[object, None] = field(default_factory=OrderedDict)
    agreement_seconds: float | None = None
    calls: Calls = field(default_factory=Calls)
    watch: Watch | None = None
    is_alone: bool = False
    patient: dist.Store | None = None
    lost: set[int] = field(default_factory=set)
    places: dict[str, tuple[tuple[int, ...], int]] = field(default_factory=dict)

    def remembers(self, plan: object) -> bool:
        """Whether the ranks have agreed on this plan before."""
        if plan not in self.agreed_plans:
            return False
        self.agreed_plans.move_to_end(plan)
        return True

    def remember(self, plan: object) -> None:
        """The ranks agree on this plan; forget the one that was not used for longest."""
        self.agreed_plans[plan] = None
        if len(self.agreed_plans) > PLANS_REMEMBERED:
            self.agreed_plans.popitem(last=False)


# The only module state: it belongs to the process groups, which torch also keeps per process, and
# goes when they are destroyed.
_STATES: WeakKeyDictionary[dist.ProcessGroup, GroupState] = WeakKeyDictionary()
_STRINGS_OF_RANKS: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], str]] = (
    WeakKeyDictionary()
)


def group_string(process_group: ProcessGroupLike | None) -> str:
    """The string by which an op finds the group: see Note [Block order].

    Args:
        process_group: None (one device), global ranks in block order, a ProcessGroup, or a
            one-dimensional DeviceMesh (both in group-rank order).

    Raises:
        ValueError: not a group that this rank can use.
        TypeError: not one of the four.
    """
    if process_group is None:
        return ALONE
    if isinstance(process_group, dist.ProcessGroup):
        return cast(str, process_group.group_name)
    if hasattr(process_group, "get_group") and hasattr(process_group, "ndim"):
        # Dynamo cannot trace a cast of a mesh.
        return _string_of_mesh(process_group)  # type: ignore[arg-type]
    if isinstance(process_group, int) and process_group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"process_group must hold this rank, {dist.get_rank()}, got what new_group() gives to "
            "ranks outside the group; call the op on the ranks of its group only."
        )
    if isinstance(process_group, (str, bytes, Set)) or not isinstance(process_group, Iterable):
        raise TypeError(
            "process_group must be None, a sequence of global ranks, a ProcessGroup or a "
            f"DeviceMesh, got {type(process_group).__name__}."
        )
    ranks = list(process_group)
    if not all(hasattr(rank, "__index__") for rank in ranks):
        raise TypeError(f"process_group must hold global ranks, ints, got {ranks}.")
    return _string_of_ranks(*[operator.index(rank) for rank in ranks])


def mesh_strings(process_group: ProcessGroupLike | None) -> tuple[str, str]:
    """(row, column): the strings of the groups that share the heads and the sequence.

    A two-dimensional DeviceMesh has both; of any other group the row is ALONE. A dimension of one
    rank is ALONE too.

    Raises:
        As `group_string`.
    """
    # Dynamo knows no further attribute of a ProcessGroup.
    if isinstance(process_group, dist.ProcessGroup) or getattr(process_group, "ndim", None) != 2:
        return ALONE, group_string(process_group)
    mesh = cast("DeviceMesh", process_group)
    _check_holds_this_rank(mesh)
    return _strings_of_two_dimensions(mesh)


def _strings_of_two_dimensions(mesh: DeviceMesh) -> tuple[str, str]:
    column, row = (
        ALONE if mesh.size(dim) == 1 else cast(str, mesh.get_group(dim).group_name)
        for dim in (0, 1)
    )
    return row, column


def mesh_place(row: str, column: str) -> tuple[int, int, int, int]:
    """(rows, columns, this rank's row, its column) of the mesh that has these groups.

    What `find_place` says of both, in integers, which torch.compile takes for constants.
    """
    heads, sequence = find_place(row), find_place(column)
    return sequence.world_size, heads.world_size, sequence.block, heads.block


def _string_of_mesh(mesh: DeviceMesh) -> str:
    if mesh.ndim != 1:
        raise ValueError(
            f"process_group as a DeviceMesh must have one dimension here, got {mesh}; "
            "pass mesh['name_of_the_sequence_dimension']. Of ring, zigzag and packed attention it "
            "may have two, (sequence, heads)."
        )
    _check_holds_this_rank(mesh)
    return cast(str, mesh.get_group().group_name)


def _check_holds_this_rank(mesh: DeviceMesh) -> None:
    if not torch.compiler.is_compiling() and mesh.get_coordinate() is None:
        raise ValueError(
            f"process_group must hold this rank, {dist.get_rank()}, got {mesh}; "
            "call the op on the ranks of its group only."
        )


def _string_of_ranks(*ranks: int) -> str:
    if not dist.is_initialized():
        raise ValueError(
            f"process_group={list(ranks)} needs torch.distributed; call "
            "torch.distributed.init_process_group() first, or pass None for one device."
        )
    world = dist.group.WORLD
    strings = _STRINGS_OF_RANKS.setdefault(cast(dist.ProcessGroup, world), {})
    if ranks not in strings:
        _check_ranks(ranks)
        try:
            group = _make_group(ranks)
        except RuntimeError as error:
            raise RuntimeError(
                f"process_group={list(ranks)} could not be made, a rank may be lost: {error}"
            ) from error
        order = [dist.get_group_rank(group, rank) for rank in ranks]
        permutation = "" if order == sorted(order) else ":" + ",".join(map(str, order))
        strings[ranks] = group.group_name + permutation
    return strings[ranks]


# What torch.compiler.assume_constant_result sets: under torch.compile the group is made while
# tracing. The decorator itself would import all of torch._dynamo, a second of every start.
_CONSTANT: list[Any] = [_string_of_ranks, _strings_of_two_dimensions, mesh_place]
for _function in _CONSTANT:
    _function._dynamo_marked_constant = True


def _check_ranks(ranks: tuple[int, ...]) -> None:
    if not ranks:
        raise ValueError("process_group must name at least one rank, got []; use None for none.")
    world_size = dist.get_world_size()
    if len(set(ranks)) != len(ranks):
        raise ValueError(f"process_group must not repeat a rank, got {list(ranks)}.")
    if not all(0 <= rank < world_size for rank in ranks):
        raise ValueError(
            f"process_group must hold ranks of the world, 0 to {world_size - 1}, got {list(ranks)}."
        )
    if dist.get_rank() not in ranks:
        raise ValueError(
            f"process_group must hold this rank, {dist.get_rank()}, got {list(ranks)}; "
            "call the op on the ranks of its group only."
        )


def _make_group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """The group of these ranks, made by its members alone."""
    world = dist.group.WORLD
    assert world is not None, ranks
    timeout = group_timeout(world)
    seconds = timeout.total_seconds()
    if (bound := _state_of(world).agreement_seconds) is not None:
        seconds = min(seconds, bound)
    answer_within(seconds, lambda: _publish_request(ranks))
    members = tuple(sorted(ranks))
    if members == tuple(range(dist.get_world_size())):
        return world
    for other, string in _STRINGS_OF_RANKS[world].items():
        if tuple(sorted(other)) == members:
            return group_of(string)
    answer_within(seconds + STORE_SECONDS, lambda: _meet(world, members, seconds))
    return _new_group_of_members(world, members, timeout)


def _new_group_of_members(
    world: dist.ProcessGroup, members: tuple[int, ...], timeout: timedelta
) -> dist.ProcessGroup:
    """What `new_group(members, use_local_synchronization=True)` should do.

    That call names the group by its ranks and by how many groups the process has, so it waits
    forever where members have different numbers of groups. Here the name is the ranks alone.
    """
    backend, store = c10d._world.pg_map[world]
    name = cast("c10d.GroupName", "nnscaler_ring/" + ",".join(map(str, members)))
    position = members.index(dist.get_rank())
    with _without_split(world):
        group, _ = c10d._new_process_group_helper(
            len(members), position, list(members), backend, store, name, timeout=timeout
        )
    c10d._world.pg_group_ranks[group] = {rank: n for n, rank in enumerate(members)}
    _state_of(group).agreement_seconds = _state_of(world).agreement_seconds
    return cast(dist.ProcessGroup, group)


@contextmanager
def _without_split(world: dist.ProcessGroup) -> Iterator[None]:
    """Groups made inside get connections of their own.

    After init_process_group(device_id=...) torch splits them off the world's NCCL communicator,
    which waits for every rank of the world, and only the members are here.
    """
    device = world.bound_device_id
    world.bound_device_id = None
    try:
        yield
    finally:
        world.bound_device_id = device


def _meet(world: dist.ProcessGroup, members: tuple[int, ...], seconds: float) -> None:
    """Wait until every member asks for the same group, so that a rank that errs is named."""
    store = world.get_group_store()
    asked = f"nnscaler_ring/group/{','.join(map(str, members))}/"
    me = dist.get_rank()
    store.set(f"{asked}{me}", "")
    keys = [f"{asked}{rank}" for rank in members]
    missing = wait_for_keys(store, keys, min(WARN_SECONDS, seconds))
    if missing and seconds > WARN_SECONDS:
        absent = [members[n] for n in missing]
        logger.warning(
            "rank %d has waited %g s for rank(s) %s to ask for process_group=%s%s",
            me,
            WARN_SECONDS,
            absent,
            list(members),
            latest_requests(absent),
        )
        missing = wait_for_keys(store, keys, seconds - WARN_SECONDS)
    if missing:
        store.delete_key(f"{asked}{me}")
        absent = [members[n] for n in missing]
        raise ValueError(
            f"process_group must be the same on all its ranks: rank {me} asks for "
            f"{list(members)}, but rank(s) {absent} did not within {seconds:g} s"
            f"{latest_requests(absent)}; if ranks start far apart, raise the bound with "
            "nnscaler_ring.set_agreement_timeout(torch.distributed.group.WORLD, ...)."
        )


def _publish_request(ranks: tuple[int, ...]) -> None:
    """Leave word of the group that this rank wants, for ranks that wait for it elsewhere."""
    store = cast(dist.ProcessGroup, dist.group.WORLD).get_group_store()
    store.set(f"{_LATEST_REQUEST}{dist.get_rank()}", str(list(ranks)))


def latest_requests(ranks: Iterable[int]) -> str:
    """Which new group each of these ranks asked for last, to end a message with; may be empty."""
    store = cast(dist.ProcessGroup, dist.group.WORLD).get_group_store()
    found = [
        f"rank {rank} last asked for process_group={store.get(f'{_LATEST_REQUEST}{rank}').decode()}"
        for rank in ranks
        if store.check([f"{_LATEST_REQUEST}{rank}"])
    ]
    return f" ({'; '.join(found)})" if found else ""


def group_timeout(group: dist.ProcessGroup) -> timedelta:
    """The time after which the group gives up a transfer."""
    device = torch.device(group._device_types[0].type if group._device_types else "cpu")
    options = group._get_backend(device).options
    if options is None:
        raise ValueError(
            "process_group must have a backend that moves data, such as gloo or nccl, got "
            f"{dist.get_backend(group)!r}; to look at shapes alone, run with process_group=None."
        )
    return options._timeout


def group_of(string: str) -> dist.ProcessGroup:
    """The process group of a group string."""
    name = cast("c10d.GroupName", string.partition(":")[0])
    try:
        return c10d._resolve_process_group(name)
    except RuntimeError as error:
        raise ValueError(f"process_group {name!r} must be alive, but was destroyed.") from error


def group_state(string: str) -> GroupState:
    """What this process remembers of the group."""
    return _state_of(group_of(string))


def _state_of(group: dist.ProcessGroup) -> GroupState:
    state = _STATES.get(group)
    if state is None:
        state = _STATES[group] = GroupState()
        world = dist.group.WORLD
        if world is not None and group is not world:
            state.lost = _state_of(world).lost
    return state


@dataclass(frozen=True)
class Place:
    """This rank's place in a group: its block, and who holds the others.

    `members[i]` is the group rank that holds block i. One block and no group for a call alone.
    """

    group: dist.ProcessGroup | None
    members: tuple[int, ...]
    block: int

    @property
    def world_size(self) -> int:
        """The number of blocks."""
        return len(self.members)

    def global_rank(self, block: int) -> int:
        """The global rank that holds a block, for messages to people."""
        return dist.get_global_rank(self.group, self.members[block]) if self.group else 0


def find_place(string: str) -> Place:
    """Where this rank stands in the group of a group string."""
    if string == ALONE:
        return Place(None, (0,), 0)
    group = group_of(string)
    places = _state_of(group).places
    if string not in places:
        order = string.partition(":")[2]
        members = tuple(map(int, order.split(","))) if order else tuple(range(group.size()))
        places[string] = members, members.index(group.rank())
    return Place(group, *places[string])


def traffic(process_group: ProcessGroupLike | None = None) -> Traffic:
    """What this rank has sent over a group for attention since the group was made, in bytes.

    Take a reading before and one after, and subtract. All zeros for `None`.
    """
    found = Traffic()
    for string in mesh_strings(process_group):
        if string != ALONE:
            found += group_state(string).traffic
    return found


def set_agreement_timeout(process_group: ProcessGroupLike, seconds: float) -> None:
    """How long this rank waits, at most, for the others of the group to compare a new plan.

    The group's own timeout unless set, and never longer. A rank that computes, compiles or saves a
    checkpoint makes the others wait and is no error; set less to be told of it as one. Groups made
    from ranks take the bound of the default group, `torch.distributed.group.WORLD`, which also
    limits how long their members wait for each other to make them.

    Raises:
        TypeError, ValueError: seconds is not a number above 0, or process_group is None.
    """
    if not isinstance(seconds, Real) or isinstance(seconds, bool):
        raise TypeError(f"seconds must be a number, got {seconds!r}.")
    if not seconds > 0:
        raise ValueError(f"seconds must be > 0, got {seconds}.")
    string = group_string(process_group)
    if string == ALONE:
        raise ValueError("process_group must be a group, got None: one device waits for nobody.")
    group_state(string).agreement_seconds = float(seconds)


def set_step(process_group: ProcessGroupLike, step: int) -> None:
    """Tell which batch this rank's next calls of the group belong to.

    A rank that skips a whole batch before its first call makes the same calls as the others, of
    other data, and nothing in the calls shows it. The step is compared in every call without a
    message of its own, so that such a rank is named at once. It stays until it is set again.

    Args:
        process_group: as in `wrap_ring_attn_func`; None does nothing.
        step: the same int on all ranks for the same batch.

    Raises:
        TypeError: step is not an int.
    """
    if isinstance(step, bool) or not hasattr(step, "__index__"):
        raise TypeError(f"step must be an int, got {step!r}.")
    string = group_string(process_group)
    if string != ALONE:
        group_state(string).calls.step = operator.index(step)
