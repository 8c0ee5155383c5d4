"""How keys and values travel, and how their gradients come home: exchanges as programs.

An exchange is a function from a schedule and a rank to a `Program`, a list of plain actions
(program.py). `Performance` performs it over a transport and gives the engine the steps of its two
loops (contract.py). Nothing outside this folder asks which exchange it is.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from nnscaler_ring.core.exchange.all_gather import all_gather
from nnscaler_ring.core.exchange.contract import GradientStep, Keys, KVExchange
from nnscaler_ring.core.exchange.direct import direct
from nnscaler_ring.core.exchange.gathered import gathered
from nnscaler_ring.core.exchange.perform import Performance
from nnscaler_ring.core.exchange.program import USUAL, Cut, Program, Sent
from nnscaler_ring.core.exchange.ring import ring
from nnscaler_ring.core.plan.schedule import Schedule

__all__ = [
    "EXCHANGES",
    "USUAL",
    "Cut",
    "Exchange",
    "GradientStep",
    "KVExchange",
    "Keys",
    "Performance",
    "Program",
    "Sent",
]


class MakesProgram(Protocol):
    """A pure function of the schedule and the rank; all ranks' programs fit each other."""

    def __call__(self, schedule: Schedule, rank: int, cut: Cut = USUAL) -> Program:
        """What `rank` does. `cut`: how long messages are, for an exchange that cuts them."""
        ...


class Exchange(NamedTuple):
    """An exchange, and what may be relied on before there is a program.

    Args:
        program: the function.
        sends_whole_shards: every row travels, whoever reads it; else only rows that are read.
        holds_all_keys: a rank holds the keys of all ranks at once, and waits for all of them.
    """

    program: MakesProgram
    sends_whole_shards: bool = False
    holds_all_keys: bool = False


EXCHANGES: dict[str, Exchange] = {
    "direct": Exchange(direct),
    "ring": Exchange(ring, sends_whole_shards=True),
    "gathered": Exchange(gathered),
    "all_gather": Exchange(all_gather, sends_whole_shards=True, holds_all_keys=True),
}
"""Exchanges by name. A new one is a function in a file of its own, listed here."""
