"""Whole ops: attention over a group by another package, its communication included.

A second seam beside the kernels, which compute one tile. A whole op is chosen before the engine, by
name: `kernel="auto"` does not take one. A new one is one file with a class that has the members of
`WholeOp`, a name in `WHOLE_OPS` and a `case` in `load_whole_op`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from nnscaler_ring.core.kernels import WHOLE_OPS

if TYPE_CHECKING:
    from nnscaler_ring.core.op.call import Call
    from nnscaler_ring.core.plan.layout import SequenceLayout
    from nnscaler_ring.core.ranks.groups import Place


class WholeOp(Protocol):
    """Attention of a whole call, differentiable, for tensors whose rows lie as in `layout`."""

    def supports(self, call: Call, place: Place) -> str | None:
        """None if it can do it and honour every argument, else the reason why it cannot."""
        ...

    def layout(self, call: Call) -> SequenceLayout:
        """Who must hold which tokens."""
        ...

    def attention(self, q: Tensor, k: Tensor, v: Tensor, call: Call, place: Place) -> Tensor:
        """out [..., rows, num_heads, head_dim] of q, k, v [..., rows, heads, head_dim]."""
        ...


def load_whole_op(name: str) -> WholeOp:
    """The whole op called `name`, one of `WHOLE_OPS`."""
    match name:
        case "transformer_engine":
            from nnscaler_ring.core.op.transformer_engine import TransformerEngine

            return TransformerEngine()
    raise ValueError(f"a whole op must be one of {WHOLE_OPS}, got {name!r}.")
