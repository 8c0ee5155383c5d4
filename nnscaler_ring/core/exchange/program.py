"""What an exchange does on one rank, as a list of actions: plain integers, which many can read.

The engine performs a program (perform.py). The simulator foretells memory and time from the same
list, counts its bytes, and stands in for the other ranks by it. Tests play the programs of all
ranks against each other. So an exchange is written once: as a function that returns a `Program`.

Note [Places]
    Rows of K and V lie in numbered places. `OWN` holds this rank's own rows. A `Receive` of keys, a
    `Gather` or a `Join` makes a new place, and `Free` ends it. In the backward pass every place
    that is computed has sums of dK and dV beside it. The sums of OWN are the result. Those of
    another place leave it with the post that sends them or with the `Scatter`; from then on they
    belong to the message. A `Receive` of gradients makes a place too: it holds dK and dV until an
    `Add` puts them into the sums of another place.

Note [Two rules of matching]
    Gloo matches messages between two ranks by kind, and within a kind by the order of posts. NCCL
    has no kinds: it matches by the order of posts alone, and a post starts only when those before
    it are done. A post that may come earlier where kinds are told apart stands in the program
    twice: `only="kinds"` where it may come first, `only="order"` where it must come last. A reader
    of a program follows one of the two rules throughout: see `performed`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from nnscaler_ring.core.plan.schedule import KeyRows, Rows, Schedule, row_count
from nnscaler_ring.core.plan.tile import Tile

KEPT_MESSAGES = 512
"""For so many messages the actions of a pass are kept; see `kept`."""

OWN = 0
"""The place of the rank's own rows: see Note [Places]."""


class Send(NamedTuple):
    """Rows of a place to a rank: keys, or the gradients of keys.

    Args:
        to: the rank.
        place: where the rows lie.
        rows: which of the place's rows, as runs in the order of the message.
        whole: these are all rows of the place.
        wide: gradients travel in the dtype of sums, because they are sums already.
    """

    to: int
    place: int
    rows: Rows
    whole: bool
    wide: bool = False

    @property
    def length(self) -> int:
        """How many rows travel."""
        return row_count(self.rows)


class Receive(NamedTuple):
    """Rows from a rank into a new place; `rows` says whose they are, in the order of the message.

    `whole` and `wide` are those of the `Send` that it meets.
    """

    sender: int
    place: int
    rows: KeyRows
    whole: bool
    wide: bool = False

    @property
    def length(self) -> int:
        """How many rows travel."""
        return sum(stop - start for _, start, stop in self.rows)


class Post(NamedTuple):
    """Start messages, all together; `transfer` is the number that `Wait` names them by.

    `only`: the rule of matching under which this post stands here; None: both. See Note [Two rules
    of matching].
    """

    transfer: int
    carries: Literal["keys", "gradients"]
    sends: tuple[Send, ...]
    receives: tuple[Receive, ...]
    only: Literal["kinds", "order"] | None = None


class Wait(NamedTuple):
    """Until the messages of a transfer have left and arrived."""

    transfer: int


class Compute(NamedTuple):
    """Attention of the rank's queries to keys of a place; in the backward pass their gradients.

    Args:
        place: where the keys lie.
        rows: whose keys they are, in the order of the place.
        tiles: count keys along the place, or along what `taken` takes of it.
        taken: slices (start, stop, step) of the place whose rows are put one after another and
            computed instead of the place; None: the place as it is.
    """

    place: int
    rows: KeyRows
    tiles: tuple[Tile, ...]
    taken: tuple[tuple[int, int, int], ...] | None = None


class Add(NamedTuple):
    """Gradients that arrived in `place` join the sums of `to`, at `rows` of it; `place` ends."""

    place: int
    to: int
    rows: Rows


class Free(NamedTuple):
    """The keys of a place are not needed any more. Its sums stay until they are sent."""

    place: int


class Join(NamedTuple):
    """Make a place of pieces (place, start, stop) of others, one after another."""

    place: int
    pieces: tuple[tuple[int, int, int], ...]


class Gather(NamedTuple):
    """Make a place of the rows of all ranks in block order, by a collective of the group."""

    place: int


class Scatter(NamedTuple):
    """Sum a gathered place's sums over the group; the own rows' part joins the sums of OWN."""

    place: int


Action = Post | Wait | Compute | Add | Free | Join | Gather | Scatter


class Sent(NamedTuple):
    """What one rank sends in one call, in units of rows: a row of K together with its row of V.

    `kv_rows` go in the forward pass and again in the backward pass. `summed_gradient_rows` travel
    in the accumulation dtype, the other gradients in the dtype of the input.
    """

    kv_rows: int
    gradient_rows: int
    summed_gradient_rows: int


@dataclass(frozen=True)
class Program:
    """What one rank does in the two passes of a call.

    Args:
        rank: whose program it is.
        k_lens: how many rows of K and V each rank holds.
        forward, backward: the actions of a pass; each may be gone through again and again.
    """

    rank: int
    k_lens: tuple[int, ...]
    forward: Iterable[Action]
    backward: Iterable[Action]

    def actions(self, *, backward: bool) -> Iterable[Action]:
        """Of one pass."""
        return self.backward if backward else self.forward

    def sent(self) -> Sent:
        """What the rank sends: the prediction that the counted bytes must meet."""
        keys = narrow = wide = 0
        padded = (len(self.k_lens) - 1) * max(self.k_lens)
        for action in performed(self.backward, in_order=True):
            if isinstance(action, Post):
                for send in action.sends:
                    count = send.length
                    if action.carries == "keys":
                        keys += count
                    elif send.wide:
                        wide += count
                    else:
                        narrow += count
            elif isinstance(action, Gather):
                keys += padded
            elif isinstance(action, Scatter):
                wide += padded
        return Sent(keys, narrow, wide)

    def replaced(self, change: Callable[[Action], Action]) -> Program:
        """The same with every action changed, each time that it is gone through."""
        return Program(
            self.rank,
            self.k_lens,
            *(Made(lambda some=some: map(change, some)) for some in (self.forward, self.backward)),  # type: ignore[misc]
        )


@dataclass(frozen=True)
class Made:
    """Actions that are made each time that they are gone through, where there are very many."""

    make: Callable[[], Iterator[Action]]

    def __iter__(self) -> Iterator[Action]:
        return self.make()


def kept(make: Callable[[], Iterator[Action]], messages: int) -> tuple[Action, ...] | Made:
    """The actions of a pass: made once, or, for more than some hundred messages, every time."""
    return tuple(make()) if messages <= KEPT_MESSAGES else Made(make)


def alone(schedule: Schedule) -> Program:
    """The program of a rank that is the only one: it computes its own keys."""
    (length,) = schedule.k_lens
    compute = Compute(OWN, ((0, 0, length),), tuple(schedule.tiles(0, (0,))))
    return Program(0, schedule.k_lens, (compute,), (compute,))


def performed(actions: Iterable[Action], *, in_order: bool) -> Iterator[Action]:
    """The actions under one rule: `in_order` as NCCL matches. Note [Two rules of matching]."""
    other = "kinds" if in_order else "order"
    return (a for a in actions if type(a) is not Post or a.only != other)


def rows_at_once(program: Program, *, backward: bool) -> int:
    """The most rows of K and V, or of their gradients, that are under way or at hand at a time.

    Rows to send count while they are sent, since they may have to be packed, and the rows of a
    place until it ends; the rank's own rows do not count.
    """
    live: Counter[str] = Counter()
    most = 0
    padded = len(program.k_lens) * max(program.k_lens)
    for action in performed(program.actions(backward=backward), in_order=False):
        match action:
            case Post():
                live[f"sent {action.transfer}"] = sum(send.length for send in action.sends)
                for receive in action.receives:
                    live[f"place {receive.place}"] = receive.length
            case Wait():
                del live[f"sent {action.transfer}"]
            case Free() | Add():
                del live[f"place {action.place}"]
            case Join():
                pieces = sum(stop - start for _, start, stop in action.pieces)
                live[f"place {action.place}"] = pieces
            case Gather():  # padded shards side by side, and the same without padding
                live[f"place {action.place}"] = padded
                most = max(most, live.total() + padded)
        most = max(most, live.total())
    return most


def travels_apart(runs: int, whole: bool, batch: int) -> bool:
    """Whether K and V of a message travel apart, without a copy, or packed into one message.

    Both sides ask: it takes rows that are one piece of memory in a contiguous tensor.
    """
    return runs == 1 and (batch == 1 or whole)


class Cut(NamedTuple):
    """How long the messages of a pass are, for exchanges that cut what a rank reads from another.

    Args:
        forward_keys, backward_keys: tokens of the longest shard per message; see Note [Memory is
            set by the message] in rounds.py.
        listed: of a pair's messages only so many and the last, which stand for all: for those who
            estimate. None: all.
    """

    forward_keys: int = 8192
    backward_keys: int = 2048
    listed: int | None = None


USUAL = Cut()
