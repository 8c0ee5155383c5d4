"""A thread beside the calls of a group, that knows when they do not come back, and why.

Note [What a waiting rank learns]
    The path that computes asks the store nothing. But where this rank has stayed in one place for
    some seconds, be it in a pass or between two, the watch tells the store where that is: the
    latest passes with their chains (Note [One history] in calls.py), what it waits for, and what
    its plan says. Where this rank is in a pass, the watch also reads what the others told. Chains
    that differ cannot be cured by waiting: that is an error, told to all. Everything else may be a
    rank that computes, compiles or saves, so it is a warning that names who is missing.

Note [The first cause]
    The first error of a group is kept under one key, for all. A transfer that fails is seldom the
    cause: its peer may have failed a moment before because of another. So a rank whose transfer
    fails says whom it blames, and follows the blame: to an error, or to a rank that blames nobody,
    which is lost.

Note [Interrupting gloo]
    A wait in gloo ends with the data, or at the group's timeout. But a wait that runs into its own
    timeout closes all connections of the group, and with that ends every other one. So whoever
    knows that a group cannot go on waits a millisecond for a message that nobody sends. The group
    cannot be used afterwards; neither could it be before.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from nnscaler_ring.core.ranks.calls import Calls, Pass, Word, describe_now, name_of_pass
from nnscaler_ring.core.ranks.comparison import DIFFERENT, GO
from nnscaler_ring.core.ranks.difference import first_difference
from nnscaler_ring.core.ranks.failure import WAY_ON, DisagreementError, Failure, OutOfStepError
from nnscaler_ring.core.ranks.store import STORE_SECONDS, answer_within, peek

logger = logging.getLogger(__name__)

PREFIX = "nnscaler_ring/"
FAILED = PREFIX + "failed"
RANKS_AT_A_LOOK = 32
"""Others whose place a rank reads in one look, so that a look costs the same at any number."""

_INTERRUPT_TAG = (1 << 31) - 1

Position = dict[str, Any]


def verdict_key(index: int) -> str:
    """Where the verdict of the comparison in a pass is kept."""
    return f"{comparison_name(index)}verdict"


def comparison_name(index: int) -> str:
    """How the keys of the comparison in a pass begin."""
    return f"{PREFIX}comparison/{index}/"


def _nnscaler_is_tracing() -> bool:
    """Whether nnScaler traces a model in this process.

    Meanwhile it replaces Python's own functions for all threads, and what a second thread calls may
    end that too early for the first: the watch does nothing until it is over.
    """
    patcher = sys.modules.get("nnscaler.graph.tracer.operator_patcher")
    context = getattr(patcher, "OperatorPatcherContext", None)
    return context is not None and context.ctx_tracer is not None


class Watch:
    """Watches the calls of one group on this rank. `lost`: ranks known to be lost, in any group."""

    def __init__(self, group: dist.ProcessGroup, calls: Calls, lost: set[int]) -> None:
        self.calls = calls
        self.ranks: list[int] = dist.get_process_group_ranks(group)
        self.rank = dist.get_rank()
        self.store: dist.Store = group.get_group_store()
        self._lost = lost
        self._group = ref(group)
        self._told = self._warned = 0.0
        self._looked = 0

    def start(self) -> None:
        """Watch until the group is destroyed or has failed."""
        threading.Thread(target=self._run, name="nnscaler_ring watch", daemon=True).start()

    def _run(self) -> None:
        while self.calls.failure is None:
            time.sleep(self.calls.bounds.beat)
            if _nnscaler_is_tracing():
                continue
            group = self._group()
            if group is None or group not in c10d._world.pg_map:
                return
            try:
                self._beat()
                self.check_words()
            except OutOfStepError:
                return  # the next pass raises it
            except RuntimeError as error:  # the store is lost: transfers will say so
                logger.debug("watch of ranks %s: %s", self.ranks, error)
            del group

    def _beat(self) -> None:
        calls, bounds = self.calls, self.calls.bounds
        made, changed = calls.current, calls.changed
        seconds = time.monotonic() - changed
        if not calls.passes or seconds < bounds.look:
            self._told = self._warned = 0.0
            return
        if seconds >= max(bounds.stay, 2 * self._told):
            self.tell()
            self._told = seconds
        if made is None:
            return
        failure = self._known_failure(made)
        positions: dict[int, Position] = {}
        if failure is None and seconds >= bounds.stay:
            positions = self._look()
            failure = self._difference(positions)
        if changed != calls.changed:
            return  # it went on meanwhile
        if failure is not None:
            self.publish(failure)
        elif seconds >= max(bounds.warn, 4 * self._warned):
            self._warned = seconds
            self._warn(made, seconds, positions)

    def _warn(self, made: Pass, seconds: float, positions: Mapping[int, Position]) -> None:
        absent = self.absent(made, positions)
        if made.wake is None and not made.waits_for:
            return  # this rank computes
        logger.warning(
            "%s: rank %d has waited %.0f s (%s); %s",
            made,
            self.rank,
            seconds,
            made.waits_for,
            self.last_heard(absent, positions) or "all ranks are in the same call",
        )

    # What this rank tells.

    def tell(self) -> None:
        """Write where this rank is."""
        self.store.set(self._key(self.rank), json.dumps(self._position()))

    def _position(self) -> Position:
        calls = self.calls
        made = calls.current
        seconds = time.monotonic() - calls.changed
        passes = list(calls.history)
        if made is not None:
            doing = f"is in {made}, {made.waits_for or 'computing'}, for at least {seconds:.0f} s"
        else:
            doing = (
                f"has been outside of its calls for at least {seconds:.0f} s, after {passes[-1]}"
            )
        return {
            "index": calls.passes,
            "inside": made is not None,
            "doing": doing,
            "passes": [
                (x.index, x.chain, x.op, x.direction, x.number, x.new, x.step) for x in passes
            ],
            "description": describe_now(made),
        }

    def _key(self, rank: int) -> str:
        return f"{PREFIX}place/{rank}"

    # What it learns.

    def _look(self) -> dict[int, Position]:
        """Where some of the others said that they are; every look goes on after the last one."""
        others = [rank for rank in self.ranks if rank != self.rank]
        some = [others[(self._looked + n) % len(others)] for n in range(len(others))]
        some = some[:RANKS_AT_A_LOOK]
        self._looked += len(some)
        return self.positions(some)

    def positions(self, ranks: Sequence[int]) -> dict[int, Position]:
        """Where these ranks said that they are, if they did."""
        found = ((rank, peek(self.store, self._key(rank))) for rank in ranks)
        return {rank: json.loads(text) for rank, text in found if text is not None}

    def _known_failure(self, made: Pass) -> Failure | None:
        """What another rank said about the group, or about this pass."""
        failed = peek(self.store, FAILED)
        if failed is not None:
            return Failure.of_text(failed)
        if made.new:
            return None  # it waits for the verdict itself
        verdict = peek(self.store, verdict_key(made.index))
        if verdict in (None, GO):
            return None
        if verdict == DIFFERENT:
            text = peek(self.store, comparison_name(made.index) + "text")
            return None if text is None else self.difference(made, json.loads(text))
        assert verdict is not None
        return Failure.of_text(verdict)

    def difference(self, made: Pass, other: Mapping[str, str]) -> Failure:
        """How another rank's description of a pass differs from this one's."""
        rank = int(other["rank"])
        mine = describe_now(made) or {}
        text = first_difference(self.rank, mine, rank, other)
        return Failure("differ", rank, text or f"rank {rank} compares a new plan in {made}")

    def _difference(self, positions: Mapping[int, Position]) -> Failure | None:
        """Where the passes of this rank and of another part, if they do."""
        mine = self._position()
        for rank, other in positions.items():
            passes = {entry[0]: entry for entry in mine["passes"]}
            for entry in other["passes"]:
                own = passes.get(entry[0])
                if own is not None and own[1] != entry[1]:
                    return self._parted(mine, own, rank, other, entry)
        return None

    def _parted(
        self, mine: Position, own: Sequence[Any], rank: int, other: Position, entry: Sequence[Any]
    ) -> Failure:
        index = own[0]
        both_there = index == mine["index"] == other["index"]
        made, others = name_of_pass(*own[2:5]), name_of_pass(*entry[2:5])
        if both_there and mine["description"] and other["description"] and made == others:
            text = first_difference(self.rank, mine["description"], rank, other["description"])
            if text is not None:
                return Failure("differ", rank, text)
        if own[6] != entry[6]:
            made, others = f"{made} of step {own[6]}", f"{others} of step {entry[6]}"
        if made == others:
            others += " with other arguments, or in another thread"
        text = (
            f"rank {rank} made {others} where rank {self.rank} made {made}; now rank {rank} "
            f"{other['doing']}; rank {self.rank} {mine['doing']}"
        )
        if own[3] != entry[3]:
            text += (
                ". A rank makes no backward pass where nothing of its q, k and v wants a gradient, "
                "or where its loss does not use the result"
            )
        return Failure("order", rank, text)

    def check_words(self) -> None:
        """Check the words of other ranks that have come through their stream meanwhile.

        Raises:
            OutOfStepError: one belongs to another pass.
        """
        words = self.calls.words
        while words and (words[0].event is None or words[0].event.query()):
            self.check_word(words.popleft())

    def check_word(self, word: Word) -> None:
        """Raise OutOfStepError if a rank said that its data belong to another pass."""
        rank = word.differs()
        if rank is None:
            return
        failure = None
        with contextlib.suppress(RuntimeError):
            failure = answer_within(STORE_SECONDS, lambda: self._why_parted(rank))
        text = f"rank {rank} sent data of another pass where rank {self.rank} made {word.name}"
        failure = self.publish(failure or Failure("order", rank, text))
        raise failure.error(word.name)

    def _why_parted(self, rank: int) -> Failure | None:
        self.tell()
        deadline = time.monotonic() + self.calls.bounds.grace
        while time.monotonic() < deadline:
            failure = self._difference(self.positions([rank]))
            if failure is not None:
                return failure
            time.sleep(0.02)
        return None

    def absent(self, made: Pass, positions: Mapping[int, Position]) -> list[int]:
        """The ranks of which nobody knows that they have come to a pass."""
        return [
            rank
            for rank in self.ranks
            if rank != self.rank
            and not (rank in positions and positions[rank]["index"] >= made.index)
        ]

    def last_heard(self, ranks: Sequence[int], positions: Mapping[int, Position]) -> str:
        """What these ranks said last, for the end of a message."""
        return "; ".join(
            f"rank {rank} {positions[rank]['doing']}"
            if rank in positions
            else f"rank {rank} has told nothing yet: it makes other calls, or has not begun"
            for rank in ranks[:4]
        )

    # Errors.

    def pass_failed(self, made: Pass, error: BaseException) -> None:
        """An error leaves a pass on this rank: tell the others, who would wait."""
        if self.calls.failure is not None or isinstance(error, DisagreementError):
            return  # all ranks raise it
        text = f"rank {self.rank} failed in {made}: {type(error).__name__}: {error}"
        self.publish(Failure("failed", self.rank, text))

    def transfer_failed(
        self, made: Pass, what: str, peers: Sequence[int], error: RuntimeError
    ) -> Exception:
        """The error to raise for a transfer that failed: Note [The first cause].

        Args:
            what: the op, the direction, what was sent or received; peers: global ranks.
        """
        failure = self.calls.failure
        if failure is None:
            seconds = STORE_SECONDS + self.calls.bounds.grace
            own = Failure("lost", peers[0], f"{what} failed: {error}")
            try:
                failure = answer_within(seconds, lambda: self._first_cause(made, own, peers, error))
            except RuntimeError:
                failure = own
            if failure.kind == "lost" and "closed" in str(error):
                self._lost.add(failure.rank)
            failure = self.publish(failure)
        if failure.kind in ("lost", "failed"):
            cause = "" if failure.text.startswith(what) else f" The first cause: {failure.text}."
            return RuntimeError(f"{what} failed: {error}.{cause} {WAY_ON}")
        return failure.error(f"{made.op} {made.direction}")

    def _first_cause(
        self, made: Pass, own: Failure, peers: Sequence[int], error: RuntimeError
    ) -> Failure:
        trouble = PREFIX + "trouble/"
        self.store.set(f"{trouble}{self.rank}", json.dumps(list(peers)))
        deadline = time.monotonic() + self.calls.bounds.grace
        while True:
            known = self._known_failure(made)
            if known is not None:
                return known
            suspect = self._blamed(trouble, peers)
            if suspect is None:
                return own
            if suspect in self._lost or time.monotonic() > deadline:
                last = self.last_heard([suspect], self.positions([suspect]))
                text = f"rank {suspect} is lost or silent ({last}), rank {self.rank} saw: {error}"
                return Failure("lost", suspect, text)
            time.sleep(0.02)

    def _blamed(self, trouble: str, peers: Sequence[int]) -> int | None:
        """The rank at the end of the blame that blames nobody; None if there is none."""
        seen, following = {self.rank}, list(peers)
        for rank in following:
            if rank in seen:
                continue
            seen.add(rank)
            blames = peek(self.store, f"{trouble}{rank}")
            if blames is None:
                return rank
            following += json.loads(blames)
        return None

    def publish(self, failure: Failure) -> Failure:
        """End this rank's calls of the group, those under way and later ones, and tell the others.

        Returns: the first cause, which all ranks get.
        """
        if self.calls.failure is not None:
            return self.calls.failure

        def ask() -> str:
            held: bytes = self.store.compare_set(FAILED, "", failure.to_text())
            return held.decode()

        first = failure
        with contextlib.suppress(RuntimeError):  # the store may be lost
            first = Failure.of_text(answer_within(STORE_SECONDS, ask))
        self.calls.failure = first
        made = self.calls.current
        wake = made.wake if made is not None else None
        if wake is not None:
            wake.set()
        group = self._group()
        if group is not None:
            _interrupt(group)
        return first


def _interrupt(group: dist.ProcessGroup) -> None:
    """End what waits in gloo for this group: Note [Interrupting gloo]."""
    for _ in _gloo_devices(group):
        peer = (group.rank() + 1) % group.size()
        with contextlib.suppress(RuntimeError):
            nothing = torch.empty(1, dtype=torch.uint8)
            work = dist.irecv(nothing, group=group, group_src=peer, tag=_INTERRUPT_TAG)
            if work is not None:
                work.wait(timedelta(milliseconds=1))


def _gloo_devices(group: dist.ProcessGroup) -> Iterator[str]:
    for pair in dist.get_backend_config(group).split(","):
        device, backend = pair.split(":")
        if backend == "gloo" and device == "cpu":
            yield device
