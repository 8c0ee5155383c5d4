"""How keys and values travel, and how their gradients come home. Overlap lives here alone.

Three exchanges with one contract. `steps` yields keys with the tiles that read them and posts the
next transfer before it yields; a step is computed while the next one is under way. In a gradient
step the caller adds dK and dV of the step's keys to `step.dk` and `step.dv`, and the exchange
carries them to the rank that owns the rows.
"""

from __future__ import annotations

from nnscaler_ring.core.exchange.all_gather import AllGatherPlan
from nnscaler_ring.core.exchange.contract import (
    ExchangePlan,
    GradientStep,
    Keys,
    KVExchange,
    Sent,
)
from nnscaler_ring.core.exchange.direct import DirectPlan
from nnscaler_ring.core.exchange.ring import RingPlan

__all__ = [
    "EXCHANGES",
    "AllGatherPlan",
    "DirectPlan",
    "ExchangePlan",
    "GradientStep",
    "KVExchange",
    "Keys",
    "RingPlan",
    "Sent",
]

EXCHANGES: dict[str, type[DirectPlan] | type[RingPlan] | type[AllGatherPlan]] = {
    "direct": DirectPlan,
    "ring": RingPlan,
    "all_gather": AllGatherPlan,
}
"""Exchanges by name. A new one is a plan class with `start` and `sent`, listed here."""
