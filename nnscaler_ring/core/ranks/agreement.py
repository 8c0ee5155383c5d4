"""Ranks compare what they are about to do, once per plan, before any data moves.

Note [Why not let the transfer find out]
    Ranks with different plans send messages that nobody expects: gloo then kills the receiving
    process, NCCL waits for its timeout, and where sizes agree by chance the result is wrong. So on
    the first use of a plan each rank writes what it has to the group's store and reads the others.
    Every wait is bounded. The n-th agreement of a group uses its own keys, so ranks that repeat a
    plan meet nobody and cost nothing.

Note [One verdict]
    A rank that has waited long enough raises; one that comes a moment later must not go on without
    it, and would find all descriptions there. So both ask for the verdict, which the store gives to
    the first: go, or why not. A rank that comes after a verdict of the second kind takes the next
    agreement, so that ranks that went on, or try again, meet there.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist

from nnscaler_ring.core.plan.tile import UNBOUNDED
from nnscaler_ring.core.ranks.groups import (
    ALONE,
    STORE_SECONDS,
    GroupState,
    Place,
    answer_within,
    find_place,
    group_state,
    group_timeout,
    latest_requests,
    wait_for_keys,
)

logger = logging.getLogger(__name__)

REFUSALS = (ValueError, TypeError, NotImplementedError)
"""What arguments can be refused with; a rank tells the others before it raises one of them."""

ERROR = "error"
"""The field under which a rank publishes its own refusal."""

GO = "go"
"""The verdict when all ranks agree."""

ARGUMENTS = {
    "mask": "the mask (causal, window_size or mask)",
    "shard_lens": "shard_lens (None: every block has as many tokens as the own)",
    "shard_lens_k": "shard_lens_k (None: every block has as many tokens as the own)",
    "batch": "batch, a dimension of q",
    "num_heads": "num_heads, a dimension of q",
    "num_kv_heads": "num_kv_heads, a dimension of k and v",
    "head_dim": "head_dim, a dimension of q and k",
    "v_head_dim": "v_head_dim, a dimension of v",
    "alibi_slopes": "the shape of alibi_slopes",
    "bias": "bias, its dtype and its sizes without rows and keys",
    "bias_gradient": "whether bias requires a gradient",
    "sinks": "whether sinks are given",
    "dropout_seed": "whether dropout_seed is given",
    "lse_gradient": "whether the loss uses softmax_lse (add 0.0 * softmax_lse where it does not)",
    "caller_layout": "layout",
    "head_offsets": "head_offsets (num_kv_heads None: those of k)",
    "other_sizes": "the other dimensions of x",
}
"""How messages call the fields of a description that are not called as the user's arguments."""

READABLE_CHARACTERS = 200
"""Two lists longer than this together are shown by their first difference."""


class RefusedByOtherRankError(ValueError):
    """Another rank of the group refused its arguments; the message names it and its reason."""


class _DisagreementError(ValueError):
    """A difference that every rank sees for itself."""


def agree(group: str, plan: object, op: str, describe: Callable[[], Mapping[str, str]]) -> None:
    """Return if all ranks of the group hold the same description of a new plan; else raise.

    Args:
        group: the group string.
        plan: hashable; a plan that was agreed on before costs a dictionary lookup.
        op: the public function, for messages.
        describe: field name -> value as text, the same on all ranks; called for a new plan only.

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
        _compare(state, place, op, describe())
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
    if place.world_size == 1:
        return
    seconds = _seconds(state, place)
    refusal = f"{type(error).__name__}: {error}"

    def publish() -> None:
        keys = _next_keys(state, place)
        keys.write({"op": op, ERROR: refusal})
        if not keys.wait_until_read(seconds):
            keys.verdict(f"rank {place.global_rank(place.block)} refused its call: {refusal}")

    try:
        answer_within(seconds + STORE_SECONDS, publish)
    except RuntimeError as lost:  # must not hide the user's mistake
        logger.debug("%s: could not tell the other ranks: %s", op, lost)


def _compare(state: GroupState, place: Place, op: str, description: Mapping[str, str]) -> None:
    ranks = [place.global_rank(block) for block in range(place.world_size)]
    mine = {"op": op, "process_group": str(ranks), **description}
    try:
        seconds = _seconds(state, place)
        problem = answer_within(
            seconds + STORE_SECONDS, lambda: _problem(_next_keys(state, place), seconds, mine)
        )
    except RuntimeError as error:
        raise RuntimeError(
            f"{op}: the store of process_group={ranks} failed while the ranks compared a new plan; "
            f"the rank that hosts it may be lost: {error}"
        ) from error
    if problem is not None:
        raise problem


def _problem(keys: _Keys, seconds: float, mine: dict[str, str]) -> ValueError | None:
    """Why the ranks cannot go on with this plan; None if they can."""
    place = keys.place
    keys.write(mine)
    missing = keys.wait_for_others(seconds)
    here = [block for block in range(place.world_size) if block not in missing]
    problem = _difference(place, mine, {block: keys.read(block) for block in here})
    if problem is not None:
        # The rank that holds the store must not leave before the others have read from it.
        keys.wait_until_read(1.0)
        return problem
    if not missing:
        verdict = keys.verdict(GO)
    else:
        absent = [place.global_rank(block) for block in missing]
        verdict = keys.verdict(
            f"rank {place.global_rank(place.block)} waited {seconds:g} s for rank(s) {absent} to "
            f"compare a new plan{latest_requests(absent)}"
        )
    keys.forget_when_read()
    if verdict == GO:
        return None
    before = f" (before that, {keys.given_up})" if keys.given_up else ""
    return _DisagreementError(
        f"{mine['op']}: {verdict}{before}. They had not called the op, or repeated an older call "
        "while other ranks' arguments changed. Pass the same arguments on all ranks; if ranks "
        "start far apart, raise the bound with nnscaler_ring.set_agreement_timeout()."
    )


def _difference(
    place: Place, mine: dict[str, str], theirs: Mapping[int, dict[str, str]]
) -> ValueError | None:
    for block, other in theirs.items():
        if ERROR in other:
            return RefusedByOtherRankError(
                f"{mine['op']}: rank {place.global_rank(block)} refused its call of "
                f"{other['op']}: {other[ERROR]}"
            )
    for name, value in mine.items():
        for block, other in theirs.items():
            if other.get(name) != value:
                here, there = contrast(value, other.get(name, "nothing"))
                return _DisagreementError(
                    f"{mine['op']}: ranks disagree on {ARGUMENTS.get(name, name)}: "
                    f"rank {place.global_rank(place.block)} has {here}, "
                    f"rank {place.global_rank(block)} has {there}; "
                    "pass the same on all ranks of the group."
                )
    return None


def contrast(mine: str, other: str) -> tuple[str, str]:
    """Two values as text, for a message: long lists by their length and first difference."""
    mine, other = (x.replace(str(UNBOUNDED), "unbounded") for x in (mine, other))
    lists = [x.startswith("[") and x.endswith("]") for x in (mine, other)]
    if not all(lists) or len(mine) + len(other) <= READABLE_CHARACTERS:
        return mine, other
    here, there = (x[1:-1].split(", ") for x in (mine, other))
    differ = (n for n, pair in enumerate(zip(here, there, strict=False)) if pair[0] != pair[1])
    first = next(differ, min(len(here), len(there)))

    def text(values: list[str]) -> str:
        value = values[first] if first < len(values) else "nothing"
        return f"{len(values)} entries with {value} at index {first}"

    return text(here), text(there)


def _seconds(state: GroupState, place: Place) -> float:
    assert place.group is not None
    return min(state.agreement_seconds, group_timeout(place.group).total_seconds())


def _next_keys(state: GroupState, place: Place) -> _Keys:
    """The keys of the first agreement that no rank has given up."""
    given_up = ""
    while True:
        keys = _Keys(state, place, given_up)
        reason = keys.reason_given_up()
        if not reason:
            return keys
        given_up = reason


class _Keys:
    """The store keys of a group's n-th agreement; `given_up`: how the one before ended, if so."""

    def __init__(self, state: GroupState, place: Place, given_up: str) -> None:
        assert place.group is not None
        self._store: dist.Store = place.group.get_group_store()
        self.place = place
        self.given_up = given_up
        self._prefix = f"nnscaler_ring/agreement/{state.agreements}/"
        state.agreements += 1

    def write(self, description: Mapping[str, str]) -> None:
        self._store.set(self._key(self.place.block), json.dumps(description))

    def read(self, block: int) -> dict[str, str]:
        found: dict[str, str] = json.loads(self._store.get(self._key(block)))
        return found

    def wait_for_others(self, seconds: float) -> list[int]:
        """The blocks whose ranks have not written after at most `seconds`."""
        blocks = range(self.place.world_size)
        return wait_for_keys(self._store, [self._key(block) for block in blocks], seconds)

    def verdict(self, proposed: str) -> str:
        """What the first rank to ask proposed: see Note [One verdict]."""
        verdict: bytes = self._store.compare_set(self._prefix + "verdict", "", proposed)
        return verdict.decode()

    def reason_given_up(self) -> str:
        """Why other ranks gave this agreement up; empty if they did not."""
        verdict = self._prefix + "verdict"
        given = self._store.get(verdict).decode() if self._store.check([verdict]) else GO
        return "" if given == GO else given

    def wait_until_read(self, seconds: float) -> bool:
        """Count this rank as a reader and wait, bounded, for the others; whether all have read."""
        deadline = time.monotonic() + seconds
        readers = self._store.add(self._prefix + "read", 1)
        while readers < self.place.world_size and time.monotonic() < deadline:
            time.sleep(0.005)
            readers = self._store.add(self._prefix + "read", 0)
        return readers >= self.place.world_size

    def forget_when_read(self) -> None:
        """Count this rank as a reader; the last one removes the keys."""
        if self._store.add(self._prefix + "read", 1) == self.place.world_size:
            for block in range(self.place.world_size):
                self._store.delete_key(self._key(block))
            self._store.delete_key(self._prefix + "verdict")
            self._store.delete_key(self._prefix + "read")

    def _key(self, block: int) -> str:
        # By group rank: ranks that disagree on the block order must still meet.
        return f"{self._prefix}{self.place.members[block]}"
