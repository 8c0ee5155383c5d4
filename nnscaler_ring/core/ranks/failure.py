"""Why a group of ranks cannot go on: the first cause, as every rank of it says it."""

from __future__ import annotations

import json
from typing import NamedTuple

WAY_ON = (
    "The ranks of this group are out of step, so it cannot be used again: make another one on all "
    "its ranks with torch.distributed.new_group(), or restart the job."
)


class RefusedByOtherRankError(ValueError):
    """Another rank of the group refused its arguments; the message names it and its reason."""


class DisagreementError(ValueError):
    """A difference between ranks that every one of them sees."""


class OutOfStepError(RuntimeError):
    """The ranks of the group do not do the same; the message says who does what, and the way on."""


class Failure(NamedTuple):
    """The first cause of a group's end. `kind` says which error it is; `text` names the ranks."""

    kind: str
    rank: int
    text: str

    def to_text(self) -> str:
        """For the store."""
        return json.dumps(self)

    @staticmethod
    def of_text(text: str) -> Failure:
        """From the store."""
        return Failure(*json.loads(text))

    def error(self, what: str) -> Exception:
        """What this rank raises; `what`: the pass in which it learned of the failure."""
        kinds: dict[str, type[Exception]] = {
            "refused": RefusedByOtherRankError,
            "differ": DisagreementError,
        }
        return kinds.get(self.kind, OutOfStepError)(f"{what}: {self.text}. {WAY_ON}")

    def later(self, op: str) -> Exception:
        """What a later call raises."""
        return OutOfStepError(f"{op}: {WAY_ON} The first cause: {self.text}.")
