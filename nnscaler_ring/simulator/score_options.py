"""The options of the public ops that change scores, for a simulated call."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nnscaler_ring.core.kernels import Problem
from nnscaler_ring.core.op import checks
from nnscaler_ring.core.scores.dropout import Dropout
from nnscaler_ring.core.scores.scores import Scores
from nnscaler_ring.simulator.call import SimulatedCall


@dataclass(frozen=True, eq=False)
class ScoreOptions:
    """Options of `wrap_*_attn_func`, for the whole sequence instead of one rank's rows.

    Args:
        bias: [batch or 1, num_heads or 1, tokens, tokens]; its gradient is computed where it
            requires one.
        alibi_slopes: [num_heads] or [batch, num_heads].
        sinks: [num_heads].
        dropout_seed: int, needed with dropout.
    """

    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    dropout_p: float = 0.0
    dropout_seed: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the call is mask and scale alone."""
        tensors = (self.alibi_slopes, self.bias, self.sinks)
        return not (self.softcap or self.dropout_p) and all(x is None for x in tensors)

    def check(self, call: SimulatedCall, device: str) -> None:
        """Raises ValueError or TypeError for what the public functions would refuse, too."""
        sizes = call.sizes
        row = torch.zeros((), dtype=sizes.torch_dtype, device=device)
        q = row.expand(sizes.batch, call.tokens, sizes.num_heads, sizes.head_dim)
        checks.check_softcap(self.softcap)
        checks.check_alibi_slopes(self.alibi_slopes, q)
        checks.check_bias(self.bias, q)
        if self.bias is not None:
            checks.check_bias_keys(self.bias, call.tokens)
        checks.check_sinks(self.sinks, q)
        checks.check_dropout_p(self.dropout_p)
        checks.check_dropout_seed(self.dropout_seed, self.dropout_p)
        if self.dropout_p and self.dropout_seed is None:
            raise ValueError(
                "dropout_seed must be an int where dropout_p is not 0, got None; simulated ranks "
                "do not draw one together."
            )

    def problem(self, problem: Problem) -> Problem:
        """What a kernel must be able to do beside the rest."""
        return replace(
            problem,
            softcap=bool(self.softcap),
            alibi=self.alibi_slopes is not None,
            bias=self.bias is not None,
            dropout=bool(self.dropout_p),
        )

    def bias_rows(self, tokens: Tensor) -> Tensor | None:
        """A rank's rows of the bias."""
        return None if self.bias is None else self.bias.detach()[..., tokens, :]

    def scores(self, call: SimulatedCall, rank: int, bias: Tensor | None, *, dbias: bool) -> Scores:
        """Of one pass of a rank, with its rows of the bias; `dbias`: the gradient is wanted."""
        slopes, dropout = self.alibi_slopes, None
        if self.dropout_p:
            dropout = Dropout(float(self.dropout_p), torch.tensor(self.dropout_seed), 0, 0)
        return Scores(
            call.scale,
            call.schedule,
            rank,
            softcap=float(self.softcap),
            alibi_slopes=None if slopes is None else slopes.view(-1, slopes.shape[-1]),
            bias=bias,
            needs_dbias=dbias and self.bias is not None and self.bias.requires_grad,
            dropout=dropout,
        )


PLAIN = ScoreOptions()
