"""Ranks compare what they are about to do, once per plan, before any data moves.

Note [Why not let the transfer find out]
    Ranks with different plans send messages that nobody expects: gloo then kills the receiving
    process, NCCL waits for its timeout, and where sizes agree by chance the result is wrong. So on
    the first use of a plan the ranks compare a digest of it (comparison.py), under the number of
    the pass in which they use it. Ranks that repeat a plan ask nobody anything: their messages say
    what they belong to, and the watch finds who is elsewhere.

Note [Errors before anything moved]
    Where a comparison ends with an error, every rank gets it in the same pass, however late it
    comes, and nothing has moved. So the group can be used further, and the next call is compared
    again, whatever its plan. If some rank was not in the comparison but already sent messages, then
    it and with it the group end.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import torch

from nnscaler_ring.core.ranks.calls import ALONE_PASS, InUseError, Pass
from nnscaler_ring.core.ranks.comparison import DIFFERENT, GO, Comparison
from nnscaler_ring.core.ranks.failure import DisagreementError, Failure, RefusedByOtherRankError
from nnscaler_ring.core.ranks.groups import (
    ALONE,
    GroupState,
    Place,
    find_place,
    group_state,
    group_timeout,
    latest_requests,
)
from nnscaler_ring.core.ranks.store import STORE_SECONDS, answer_within, patient_client
from nnscaler_ring.core.ranks.watch import Watch, comparison_name

logger = logging.getLogger(__name__)

REFUSALS = (ValueError, TypeError, NotImplementedError)
"""What arguments can be refused with; a rank tells the others before it raises one of them."""


def agree(
    group: str,
    plan: object,
    op: str,
    describe: Callable[[], Mapping[str, str]],
    *,
    tag: int,
    direction: str = "forward",
    number: int | None = None,
) -> Pass:
    """Begin a pass; if its plan is new, once all ranks of the group hold the same one.

    Args:
        group: the group string.
        plan: hashable; a plan that was agreed on before costs a dictionary lookup.
        op: the public function, for messages.
        describe: field name -> value as text, the same on all ranks.
        tag: a number that is the same on all ranks that have the same plan.
        number: of the call that the pass belongs to; None for a new call.

    Raises:
        ValueError: a field differs (named, with ranks and both values), or ranks did not come.
        RefusedByOtherRankError: a rank published its own error instead.
        OutOfStepError: the group failed before.
    """
    if group == ALONE:
        return ALONE_PASS
    state = group_state(group)
    if state.calls.failure is not None:
        raise state.calls.failure.later(op)
    watch = _watch_of(state, group)
    if state.calls.words and watch is not None:
        watch.check_words()
    new = watch is not None and not state.remembers(plan)
    made = _begin(state, watch, op, direction, tag, number, new=new)
    made.describe, made.watch, made.traffic = describe, watch, state.traffic
    if watch is not None and new:
        try:
            _compare(state, find_place(group), watch, made, {"op": op, **describe()})
        except BaseException:
            state.calls.end(made)
            raise
        state.remember(plan)
    return made


def _begin(
    state: GroupState,
    watch: Watch | None,
    op: str,
    direction: str,
    tag: int,
    number: int | None,
    *,
    new: bool,
) -> Pass:
    try:
        return state.calls.begin(op, direction, tag, number, new=new)
    except InUseError as error:
        if watch is not None:
            watch.publish(Failure("order", watch.rank, f"on rank {watch.rank} {error}"))
        raise


def _watch_of(state: GroupState, group: str) -> Watch | None:
    """The watch of a group of several ranks, started with its first pass."""
    if state.watch is None and not state.is_alone:
        place = find_place(group)
        state.is_alone = place.world_size == 1
        if not state.is_alone:
            assert place.group is not None, place
            state.watch = Watch(place.group, state.calls, state.lost)
            state.watch.start()
    return state.watch


@contextmanager
def refusing_together(group: str, op: str) -> Iterator[None]:
    """Tell the other ranks of a ValueError, TypeError or NotImplementedError raised inside."""
    try:
        yield
    except (RefusedByOtherRankError, DisagreementError):
        raise
    except REFUSALS as error:
        if group != ALONE and not torch.compiler.is_compiling():
            _publish_refusal(group, op, error)
        raise


def _publish_refusal(group: str, op: str, error: Exception) -> None:
    """Count the pass that this rank refuses, and leave its error where the others look for it."""
    state = group_state(group)
    watch = _watch_of(state, group)
    if watch is None or state.calls.failure is not None:
        return
    made = _begin(state, watch, op, "refused", 0, None, new=True)
    text = f"rank {watch.rank} refused its call of {op}: {type(error).__name__}: {error}"
    failure = Failure("refused", watch.rank, text)
    try:
        answer_within(
            STORE_SECONDS, lambda: _comparison(state, watch, made).propose(failure.to_text())
        )
    except RuntimeError as lost:  # must not hide the user's mistake
        logger.debug("%s: could not tell the other ranks: %s", op, lost)
    _all_ranks_raise(state, made)
    state.calls.end(made)


def _all_ranks_raise(state: GroupState, made: Pass) -> None:
    """Note [Errors before anything moved]."""
    state.agreed_plans.clear()
    state.calls.forget_difference(made)


def _comparison(state: GroupState, watch: Watch, made: Pass) -> Comparison:
    if state.patient is None:
        state.patient = patient_client(watch.store)
    state.agreements += 1
    return Comparison(watch.store, state.patient, comparison_name(made.index), len(watch.ranks))


def _compare(
    state: GroupState, place: Place, watch: Watch, made: Pass, description: Mapping[str, str]
) -> None:
    assert place.group is not None, place
    ranks = [place.global_rank(block) for block in range(place.world_size)]
    mine = {"op": made.op, "process_group": str(ranks), **description}
    made.describe = lambda: mine
    seconds = group_timeout(place.group).total_seconds()
    if state.agreement_seconds is not None:
        seconds = min(seconds, state.agreement_seconds)
    made.waits_for = "waiting to compare a new plan"
    made.wake = threading.Event()
    try:
        problem = answer_within(
            seconds + STORE_SECONDS,
            lambda: _problem(_comparison(state, watch, made), watch, made, mine, seconds),
            made.wake,
            meanwhile=lambda: _tell(watch),
        )
    except RuntimeError as error:
        if state.calls.failure is not None:
            raise state.calls.failure.error(made.op) from error
        raise RuntimeError(
            f"{made.op}: the store of process_group={ranks} failed while the ranks compared a new "
            f"plan; the rank that hosts it may be lost: {error}"
        ) from error
    if problem is not None:
        _all_ranks_raise(state, made)
        raise problem
    made.waits_for, made.wake = "", None


def _tell(watch: Watch) -> None:
    """Say that this rank has come, for others that give up."""
    with suppress(RuntimeError):  # a lost store is seen by who waits for it
        watch.tell()


def _problem(
    comparison: Comparison, watch: Watch, made: Pass, mine: dict[str, str], seconds: float
) -> Exception | None:
    """Why the ranks cannot go on with this plan; None if they can."""
    text = json.dumps(mine)
    digest = comparison.digest(text)
    verdict = comparison.arrive(digest) or _wait(comparison, watch, made, seconds)
    if verdict == GO:
        comparison.leave(digest)
        return None
    if verdict != DIFFERENT:
        failure = Failure.of_text(verdict)
        error = RefusedByOtherRankError if failure.kind == "refused" else DisagreementError
        return error(f"{mine['op']}: {failure.text}")
    other = comparison.other_text(json.dumps({**mine, "rank": str(watch.rank)}), _same)
    if other is None:
        return DisagreementError(f"{mine['op']}: ranks disagree, but the one that differs is lost.")
    failure = watch.difference(made, json.loads(other))
    return DisagreementError(f"{mine['op']}: {failure.text}.")


def _same(mine: str, other: str) -> bool:
    """Whether two descriptions are alike but for the rank."""
    return {**json.loads(mine), "rank": ""} == {**json.loads(other), "rank": ""}


def _wait(comparison: Comparison, watch: Watch, made: Pass, seconds: float) -> str:
    """The verdict of the comparison; this rank's own when it has waited for so long."""
    verdict = comparison.wait(seconds)
    if verdict is not None:
        return verdict
    others = [rank for rank in watch.ranks if rank != watch.rank]
    positions = watch.positions(others)
    absent = watch.absent(made, positions)
    text = (
        f"rank {watch.rank} waited {seconds:g} s for rank(s) {absent} to compare a new plan"
        f"{latest_requests(absent)}. {watch.last_heard(absent, positions)}. Pass the same "
        "arguments on all ranks; where ranks start far apart, raise the bound with "
        "nnscaler_ring.set_agreement_timeout()."
    )
    return comparison.propose(Failure("late", watch.rank, text).to_text())
