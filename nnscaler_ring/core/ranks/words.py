"""A word of each rank beside the data it sends, where messages have no tags.

See Note [Words beside the data] in transport.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nnscaler_ring.core.ranks.calls import Pass, Word


class Message(NamedTuple):
    """A contiguous tensor to send to, or to receive from, the rank that holds `block`."""

    block: int
    tensor: Tensor


class Words:
    """The words of one pass: which peers have been told, and what they said.

    `members[block]` is the global rank that holds a block.
    """

    def __init__(self, entered: Pass, members: Sequence[int]) -> None:
        self._entered = entered
        self._members = members
        self._told: set[int] = set()
        self._heard: set[int] = set()
        self._gathered: Tensor | None = None

    def beside(
        self, sends: Sequence[Message], receives: Sequence[Message], device: torch.device
    ) -> tuple[list[Message], list[Message], Callable[[], None] | None]:
        """Words to post before these messages, and what checks those that come, if any do."""
        told = _new_blocks(sends, self._told)
        heard = _new_blocks(receives, self._heard)
        mine = self._mine(device) if told else None
        outgoing = [Message(block, mine) for block in told if mine is not None]
        incoming = [
            Message(block, torch.empty(1, dtype=torch.int64, device=device)) for block in heard
        ]
        if not incoming:
            return outgoing, incoming, None
        ranks = [self._members[block] for block in heard]
        return outgoing, incoming, lambda: self._check([x.tensor for x in incoming], ranks)

    def to_gather(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """(output, input) of a gathering of words, before the first collective of the pass."""
        if self._gathered is not None:
            return None
        self._gathered = torch.empty(len(self._members), dtype=torch.int64, device=device)
        return self._gathered, self._mine(device)

    def check_gathered(self) -> None:
        """Check the words that `to_gather` gathered, if it did just now."""
        if self._gathered is not None and self._gathered.numel():
            # In group order, which is the order of global ranks.
            self._check([self._gathered], sorted(self._members))
            self._gathered = self._gathered[:0]

    def _mine(self, device: torch.device) -> Tensor:
        return torch.full((1,), self._entered.chain, dtype=torch.int64, device=device)

    def _check(self, words: Sequence[Tensor], ranks: Sequence[int]) -> None:
        entered = self._entered
        assert entered.watch is not None and entered.calls is not None, entered
        together = words[0] if len(words) == 1 else torch.cat(list(words))
        word = Word.arriving(together, ranks, entered)
        if together.device.type == "cpu":
            entered.watch.check_word(word)
        else:
            entered.calls.words.append(word)


def _new_blocks(messages: Sequence[Message], known: set[int]) -> list[int]:
    new = [block for block in dict.fromkeys(x.block for x in messages) if block not in known]
    known.update(new)
    return new
