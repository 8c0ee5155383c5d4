"""The messages of the direct exchange: how many, in which order, with which rows and tiles.

Note [Memory is set by the message]
    The direct exchange cuts what a rank reads from another into messages of about so many keys,
    each with its own tiles. A message's keys, the next message's, and in the backward pass the
    gradients of the last one are alive at a time: a few messages, however many ranks there are.
    Every message costs calls and a merge of its own, so they are longer in the forward pass, which
    has far less alive beside them than the backward pass. The number of parts follows the longest
    shard, so halves and wholes stay in step, and is a power of two, so that messages end where
    zigzag chunks end: a tile cut elsewhere costs two more calls. A pair that needs so few rows that
    its messages would be shorter than an eighth of the usual has fewer of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from nnscaler_ring.core.plan.schedule import PairWork, Schedule, Step, row_count

SHORTEST = 8
"""The part of a message's usual length below which messages are not cut."""

KEPT_ROUNDS = 4096
"""So many messages of a pass are planned once; more, of very long shards, anew in every pass."""


@dataclass(frozen=True)
class Round:
    """One message in and one out: the step it brings, and the step it makes possible elsewhere.

    `number`: its place in the sequence of rounds, which all ranks share.
    """

    number: int
    incoming: Step
    target: int
    outgoing: Step


@dataclass(frozen=True)
class Distance:
    """A rank and the two that are so many ranks from it: one that it reads, one that reads it."""

    distance: int
    incoming: PairWork
    target: int
    outgoing: PairWork

    @classmethod
    def of(cls, schedule: Schedule, rank: int, distance: int) -> Distance:
        """From the schedule."""
        ranks = schedule.world_size
        source, target = (rank - distance) % ranks, (rank + distance) % ranks
        incoming = schedule.pair(rank, source)
        return cls(distance, incoming, target, schedule.pair(target, rank))

    def parts(self, longest: int, keys: int) -> tuple[int, int]:
        """How many messages come in and go out, of about `keys` tokens of the longest shard."""
        incoming, outgoing = (row_count(pair.rows) for pair in (self.incoming, self.outgoing))
        return message_count(incoming, longest, keys), message_count(outgoing, longest, keys)

    def rounds(
        self, longest: int, keys: int, chosen: Iterable[int] | None = None
    ) -> Iterator[Round]:
        """These messages, or those of them whose numbers, from 0, are `chosen`.

        The side that has fewer ends with empty ones; what is empty on both is left out.
        """
        parts_in, parts_out = self.parts(longest, keys)
        first = self.distance * _most_messages(longest, keys)
        for number in range(max(parts_in, parts_out)) if chosen is None else chosen:
            incoming = self.incoming.step(number, parts_in)
            outgoing = self.outgoing.step(number, parts_out)
            if incoming.rows or outgoing.rows:
                yield Round(first + number, incoming, self.target, outgoing)


def message_count(rows: int, longest: int, keys: int) -> int:
    """In how many messages a pair's rows travel: Note [Memory is set by the message]."""
    shortest = max(1, keys // SHORTEST)
    return min(_most_messages(longest, keys), _power_of_two(-(-rows // shortest)))


def _most_messages(longest: int, keys: int) -> int:
    return _power_of_two(longest // keys)


class Rounds:
    """The messages of one pass in order, the nearest distance first.

    A shard of millions of tokens has so many that they would take more time and memory than all
    else of the plan: then they are made when they are asked for. See `KEPT_ROUNDS`.

    Args:
        listed: of a pair's messages only so many and the last, for those who estimate.
    """

    def __init__(
        self, distances: Sequence[Distance], longest: int, keys: int, listed: int | None = None
    ) -> None:
        self._distances = distances
        self._longest = longest
        self._keys = keys
        self._listed = listed
        self.most = sum(max(some.parts(longest, keys)) for some in distances)
        self._kept = tuple(self._made()) if self.most <= KEPT_ROUNDS else None

    def __iter__(self) -> Iterator[Round]:
        return self._made() if self._kept is None else iter(self._kept)

    def _made(self) -> Iterator[Round]:
        for some in self._distances:
            chosen = None
            if self._listed is not None:
                most = max(some.parts(self._longest, self._keys))
                chosen = sorted({*range(min(self._listed, most)), most - 1})
            yield from some.rounds(self._longest, self._keys, chosen)


def rounds_of(
    schedule: Schedule, rank: int, *keys: int, listed: int | None = None
) -> tuple[Rounds, ...]:
    """A rank's messages with all others, of about so many tokens of the longest shard each.

    Of one or several passes; passes with messages of one length have the same.
    """
    distances = [Distance.of(schedule, rank, n) for n in range(1, schedule.world_size)]
    made: dict[int, Rounds] = {}
    for some in keys:
        if some not in made:
            made[some] = Rounds(distances, max(schedule.k_lens), some, listed)
    return tuple(made[some] for some in keys)


def _power_of_two(number: int) -> int:
    """The largest that is not above `number`, at least 1."""
    return 1 << max(0, number.bit_length() - 1)
