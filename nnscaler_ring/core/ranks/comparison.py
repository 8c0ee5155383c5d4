"""All ranks of a group find out whether they hold the same digest, with few requests to a store.

Note [One sum]
    Each rank adds its digest to one number of the store, which answers with the sum so far. If k
    ranks with the same digest d have come, the sum is k * d; another digest makes it something that
    d does not divide, so whoever comes second sees the difference at once, and the last of N equal
    ranks knows that it is the last. It then writes the verdict, for which the others wait. Every
    rank adds its digest once more when it has read the verdict; the one that reaches 2 * N * d
    removes both keys. So a rank makes 3 requests, one of them 5, however many ranks there are.

Note [One verdict]
    A rank that gives up must not leave the others to find all digests there a moment later. So
    whoever ends a comparison proposes a verdict, and the store keeps the first: go, different, or a
    `Failure`. A rank that comes after it gets the same. A rank that finds its own arguments wrong
    proposes its error without having come, and need not wait for anybody.

Note [Texts on a difference]
    Only then are texts read: the first rank that writes one takes the first slot, and the first
    whose text differs from that takes the second. Every rank compares its own with one of the two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch.distributed as dist

from nnscaler_ring.core.ranks.store import peek, wait_for_keys, wait_for_value

GO = "go"
DIFFERENT = "different"
TEXT_SECONDS = 5.0


class Comparison:
    """One comparison of a group: its keys begin with `name`, which no other one has.

    Args:
        patient: a client of the same store for long waits, None to poll.
    """

    def __init__(
        self, store: dist.Store, patient: dist.Store | None, name: str, world_size: int
    ) -> None:
        self._store = store
        self._patient = patient
        self._name = name
        self._world_size = world_size
        # 2 * world_size digests must fit in the store's 64 bits with a sign.
        self._bits = 62 - (2 * world_size).bit_length()

    def digest(self, text: str) -> int:
        """A number for a text; two texts have the same one once in 2^50 (1,024 ranks)."""
        number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
        return number % (1 << self._bits) | 1 << (self._bits - 1)

    def arrive(self, digest: int) -> str | None:
        """Say what this rank holds; the verdict, if there is one now: Note [One sum]."""
        count, rest = divmod(self._store.add(self._name + "sum", digest), digest)
        if rest or count > self._world_size:
            return self.propose(DIFFERENT)
        return self.propose(GO) if count == self._world_size else None

    def propose(self, verdict: str) -> str:
        """End the comparison; the verdict that holds: Note [One verdict]."""
        held: bytes = self._store.compare_set(self.verdict_key, "", verdict)
        return held.decode()

    @property
    def verdict_key(self) -> str:
        """Where others find how it ended."""
        return self._name + "verdict"

    def wait(self, seconds: float) -> str | None:
        """The verdict, or None after at most `seconds`."""
        return wait_for_value(self._store, self._patient, self.verdict_key, seconds)

    def leave(self, digest: int) -> None:
        """This rank has read the verdict "go"; the last one removes the keys."""
        if self._store.add(self._name + "sum", digest) == 2 * self._world_size * digest:
            self._store.delete_key(self.verdict_key)
            self._store.delete_key(self._name + "sum")

    def other_text(self, mine: str, same: Callable[[str, str], bool]) -> str | None:
        """A text that is not the same as mine: Note [Texts on a difference]; None if none came."""
        first = self._store.compare_set(self._name + "text", "", mine).decode()
        if not same(first, mine):
            self._store.compare_set(self._name + "other text", "", mine)
            return first
        wait_for_keys(self._store, [self._name + "other text"], TEXT_SECONDS)
        return peek(self._store, self._name + "other text")
