"""Ranks compare what they are about to do, once per plan, before any data moves.

Note [Why not let the transfer find out]
    Ranks with different plans send messages that nobody expects: gloo then kills the receiving
    process, NCCL waits for its timeout, and where sizes agree by chance the result is wrong. So on
    the first use of a plan each rank writes what it has to the group's store and reads the others.
    Every wait is bounded. The n-th agreement of a group uses its own keys, so ranks that repeat a
    plan meet nobody and cost nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist

from nnscaler_ring.core.groups import (
    ALONE,
    GroupState,
    Place,
    find_place,
    group_state,
    group_timeout,
    wait_for_keys,
)

REFUSALS = (ValueError, TypeError, NotImplementedError)
"""What arguments can be refused with; a rank tells the others before it raises one of them."""

ERROR = "error"
"""The field under which a rank publishes its own refusal."""


class RefusedByOtherRankError(ValueError):
    """Another rank of the group refused its arguments; the message names it and its reason."""


class _DisagreementError(ValueError):
    """A difference that every rank sees for itself."""


def agree(group: str, plan: object, op: str, description: Mapping[str, str]) -> None:
    """Return if all ranks of the group hold the same description of a new plan; else raise.

    Args:
        group: the group string.
        plan: hashable; a plan that was agreed on before costs a dictionary lookup.
        op: the public function, for messages.
        description: field name -> value as text, the same on all ranks.

    Raises:
        ValueError: a field differs (named, with ranks and both values), or ranks did not come.
        RefusedByOtherRankError: a rank published its own error instead.
    """
    if group == ALONE:
        return
    state = group_state(group)
    if state.remembers(plan):
        return
    place = find_place(group)
    if place.world_size > 1:
        _compare(state, place, op, description)
    state.remember(plan)


@contextmanager
def refusing_together(group: str, op: str) -> Iterator[None]:
    """Tell the other ranks of a ValueError, TypeError or NotImplementedError raised inside."""
    try:
        yield
    except (RefusedByOtherRankError, _DisagreementError):
        raise
    except REFUSALS as error:
        if group != ALONE and not torch.compiler.is_compiling():
            _publish_refusal(group, op, error)
        raise


def _publish_refusal(group: str, op: str, error: Exception) -> None:
    state, place = group_state(group), find_place(group)
    if place.world_size > 1:
        keys = _Keys(state, place)
        keys.write({"op": op, ERROR: f"{type(error).__name__}: {error}"})
        keys.wait_until_read(_seconds(state, place))


def _compare(state: GroupState, place: Place, op: str, description: Mapping[str, str]) -> None:
    keys = _Keys(state, place)
    mine = {"op": op, **description}
    keys.write(mine)
    seconds = _seconds(state, place)
    missing = keys.wait_for_others(seconds)
    if missing:
        ranks = [place.global_rank(block) for block in missing]
        raise _DisagreementError(
            f"{op}: rank(s) {ranks} did not come to compare this new plan within {seconds:g} s: "
            "they have not called the op, or they repeat an older call while this rank's "
            "arguments changed. Pass the same arguments on all ranks; if ranks start far apart, "
            "raise the bound with nnscaler_ring.set_agreement_timeout()."
        )
    theirs = {block: keys.read(block) for block in range(place.world_size)}
    problem = _difference(place, op, mine, theirs)
    if problem is None:
        keys.forget_when_read()
        return
    # The rank that holds the store must not leave before the others have read from it.
    keys.wait_until_read(1.0)
    raise problem


def _difference(
    place: Place, op: str, mine: dict[str, str], theirs: dict[int, dict[str, str]]
) -> ValueError | None:
    for block, other in theirs.items():
        if ERROR in other:
            return RefusedByOtherRankError(
                f"{op}: rank {place.global_rank(block)} refused its call of {other['op']}: "
                f"{other[ERROR]}"
            )
    for name in mine:
        values = {block: other.get(name, "nothing") for block, other in theirs.items()}
        for block, value in values.items():
            if value != values[place.block]:
                return _DisagreementError(
                    f"{op}: ranks disagree on {name}: rank {place.global_rank(place.block)} has "
                    f"{mine[name]}, rank {place.global_rank(block)} has {value}; "
                    "pass the same on all ranks of the group."
                )
    return None


def _seconds(state: GroupState, place: Place) -> float:
    assert place.group is not None
    return min(state.agreement_seconds, group_timeout(place.group).total_seconds())


class _Keys:
    """The store keys of a group's n-th agreement."""

    def __init__(self, state: GroupState, place: Place) -> None:
        assert place.group is not None
        self._store: dist.Store = place.group.get_group_store()
        self._place = place
        self._prefix = f"nnscaler_ring/agreement/{state.agreements}/"
        state.agreements += 1

    def write(self, description: Mapping[str, str]) -> None:
        self._store.set(self._key(self._place.block), json.dumps(description))

    def read(self, block: int) -> dict[str, str]:
        found: dict[str, str] = json.loads(self._store.get(self._key(block)))
        return found

    def wait_for_others(self, seconds: float) -> list[int]:
        """The blocks whose ranks have not written after at most `seconds`."""
        blocks = range(self._place.world_size)
        return wait_for_keys(self._store, [self._key(block) for block in blocks], seconds)

    def wait_until_read(self, seconds: float) -> None:
        """Count this rank as a reader and wait, bounded, for the others."""
        deadline = time.monotonic() + seconds
        readers = self._store.add(self._prefix + "read", 1)
        while readers < self._place.world_size and time.monotonic() < deadline:
            time.sleep(0.005)
            readers = self._store.add(self._prefix + "read", 0)

    def forget_when_read(self) -> None:
        """Count this rank as a reader; the last one removes the keys."""
        if self._store.add(self._prefix + "read", 1) == self._place.world_size:
            for block in range(self._place.world_size):
                self._store.delete_key(self._key(block))
            self._store.delete_key(self._prefix + "read")

    def _key(self, block: int) -> str:
        # By group rank: ranks that disagree on the block order must still meet.
        return f"{self._prefix}{self._place.members[block]}"
