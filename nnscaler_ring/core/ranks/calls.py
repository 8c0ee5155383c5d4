"""The calls of one group on this rank: each has a number, and the ranks' histories must be alike.

Note [One history]
    A forward pass, a move of rows and a backward pass are passes over a group. They are counted
    where they are made, and every rank of the group must make the same ones in the same order: the
    same function, the same plan, the same direction, and in a backward pass the same forward pass.
    All of this goes into one number, the chain, to which every pass adds: two ranks whose chains
    are equal have made the same passes. The tag of a message is made of the same facts, so a
    message of one pass is never taken for another's; and where two ranks wait for each other in
    different passes, their chains tell from where on they differ (watch.py).

Note [Threads]
    Two threads that call one group at a time would take each other's messages, because both ranks
    count, but not in the same order. So a pass that begins while another thread is inside one is
    refused. Passes of several threads that take turns are right where the turns are the same on
    all ranks: the name of a thread other than the first is part of the chain. A thread that Python
    did not start is autograd's, which runs one backward pass at a time for whoever waits for it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from nnscaler_ring.core.ranks.failure import Failure

if TYPE_CHECKING:
    from nnscaler_ring.core.ranks.groups import Traffic
    from nnscaler_ring.core.ranks.watch import Watch

PASSES_TOLD = 64
"""Passes whose chains a rank keeps, and tells others that wait for it."""

TAG_BITS = 28

_DIRECTIONS = {"forward": 1, "backward": 2, "refused": 3}
_CHAIN_MASK = (1 << 61) - 1


class Pass:
    """One pass of this rank over a group; a context in which it is under way.

    `index`: which pass of the group it is, from 1. `number`: the index of the call that it belongs
    to, its own unless it is a backward pass. `tag`: for its messages, the same on all ranks that
    make the same pass. `new`: the ranks compare its plan first. `describe`: what they compare.
    `waits_for`: in words, while it waits. `wake`: what it waits on, in a comparison. `watch`: told
    of an error that leaves the pass. `step`: of the batch, as the caller said. `traffic`: where
    to count what it sends.
    """

    __slots__ = (
        "calls",
        "chain",
        "describe",
        "direction",
        "index",
        "new",
        "number",
        "op",
        "step",
        "tag",
        "thread",
        "traffic",
        "waits_for",
        "wake",
        "watch",
    )

    def __init__(self, calls: Calls | None, op: str, direction: str, number: int) -> None:
        self.calls = calls
        self.op = op
        self.direction = direction
        self.number = number
        self.index = self.chain = self.tag = self.thread = 0
        self.new = False
        self.describe: Callable[[], Mapping[str, str]] | None = None
        self.waits_for = ""
        self.wake: threading.Event | None = None
        self.watch: Watch | None = None
        self.traffic: Traffic | None = None
        self.step = 0

    def __enter__(self) -> Pass:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.calls is None:
            return
        if error is not None and self.watch is not None:
            self.watch.pass_failed(self, error)
        self.calls.end(self)

    def __str__(self) -> str:
        return name_of_pass(self.op, self.direction, self.number)


def name_of_pass(op: str, direction: str, number: int) -> str:
    """A pass for messages to people."""
    what = "the backward of call" if direction == "backward" else "call"
    return f"{what} {number} ({op})"


@dataclass
class Bounds:
    """After how many seconds the watch of a group does what (watch.py).

    `beat`: between two looks at this rank. Of a pass that takes longer than the others: `look` for
    an error of another rank, `stay` until this rank tells where it is and looks where the others
    are, `warn` to log who is missing. `grace`: for the first cause of an error to arrive.
    """

    beat: float = 0.5
    look: float = 1.0
    stay: float = 2.0
    warn: float = 5.0
    grace: float = 1.0


@dataclass
class Calls:
    """What this rank has done over a group, and is doing.

    `passes`: how many it has begun; `step`: what the caller said of the batch. `changed`: when a
    pass last began or ended, in seconds of `time.monotonic`. `failure`: why the group cannot be
    used any more. `words`: of other ranks, still on their way through a stream.
    """

    passes: int = 0
    chain: int = 0
    step: int = 0
    changed: float = 0.0
    current: Pass | None = None
    history: deque[Pass] = field(default_factory=lambda: deque(maxlen=PASSES_TOLD))
    failure: Failure | None = None
    bounds: Bounds = field(default_factory=Bounds)
    words: deque[Word] = field(default_factory=deque)
    thread: threading.Thread | None = None
    ident: int = 0

    def begin(
        self, op: str, direction: str, plan_tag: int, number: int | None, *, new: bool
    ) -> Pass:
        """The next pass; a call of its own, unless it belongs to one with a number.

        Raises:
            InUseError: another thread is inside a pass of the group.
        """
        ident = threading.get_ident()
        current = self.current
        if current is not None and current.thread != ident:
            raise InUseError(op, current)
        self.passes += 1
        if number is None:
            number = self.passes
        made = Pass(self, op, direction, number)
        made.thread = ident
        made.step = self.step
        made.index = self.passes
        word = (
            plan_tag * 0x9E3779B1
            + number * 0x85EBCA6B
            + _DIRECTIONS[direction] * 0xC2B2AE35
            + self.step * 0x27D4EB2F165667C5
        )
        if ident != self.ident:
            word += self._thread_word(ident)
        made.tag = ((word >> 7) + self.passes * 0x9E3779B1) & ((1 << TAG_BITS) - 1)
        made.new = new
        self.chain = made.chain = (self.chain * 1000003 + word + new) & _CHAIN_MASK
        self.history.append(made)
        self.current = made
        self.changed = time.monotonic()
        return made

    def end(self, made: Pass) -> None:
        """The pass is over."""
        made.describe = made.wake = made.watch = None
        made.waits_for = ""
        if self.current is made:
            self.current = None
        self.changed = time.monotonic()

    def forget_difference(self, made: Pass) -> None:
        """All ranks raise in this pass, before anything moved: whatever they wanted, it counts as
        one and the same, so that they may go on."""
        self.chain = made.chain = made.index * 0x9E3779B97F4A7C15 & _CHAIN_MASK

    def _thread_word(self, ident: int) -> int:
        """0 for the first thread and for autograd's; else by its name: Note [Threads]."""
        thread = threading.current_thread()
        if isinstance(thread, threading._DummyThread):
            return 0
        if self.thread is None or not self.thread.is_alive():
            self.thread, self.ident = thread, ident
            return 0
        return crc32(thread.name.encode()) * 0x165667B1


class Word(NamedTuple):
    """What other ranks said about their pass, in host memory once `event` has happened."""

    values: Tensor
    event: torch.Event | None
    ranks: Sequence[int]
    expected: int
    name: str

    @staticmethod
    def arriving(values: Tensor, ranks: Sequence[int], entered: Pass) -> Word:
        """What arrived beside the data of a pass; `values` are in order of the current stream."""
        event = None
        if values.device.type != "cpu":
            host = torch.empty_like(values, device="cpu", pin_memory=values.is_cuda)
            event = torch.Event(values.device.type)
            values = host.copy_(values, non_blocking=True)
            event.record()
        return Word(values, event, ranks, entered.chain, str(entered))

    def differs(self) -> int | None:
        """A rank that is in another pass; ask once the event has happened."""
        for rank, value in zip(self.ranks, self.values.tolist(), strict=True):
            if value != self.expected:
                return rank
        return None


class InUseError(RuntimeError):
    """Another thread is inside a call of the same group."""

    def __init__(self, op: str, current: Pass) -> None:
        super().__init__(
            f"{op}: the group is in {current} of another thread; threads that call at the same "
            "time need a group each (torch.distributed.new_group), made in the same order on all "
            "ranks."
        )


ALONE_PASS = Pass(None, "", "forward", 0)
"""The pass of a call without a group."""


def describe_now(made: Pass | None) -> dict[str, Any] | None:
    """What a pass compares, while it is under way."""
    describe = made.describe if made is not None else None
    if made is None or describe is None:
        return None
    return {"op": made.op, **describe()}
