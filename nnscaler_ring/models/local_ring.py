"""Ring attention on one device: the order of the ring without the ranks.

The sequence is cut into chunks. Each chunk of queries attends to its own chunk of keys first, then
to the one before it, and so on around the ring; partial results are merged as on ranks. For looking
at the ring, and for models that say how many chunks they want: values and gradients do not depend
on the number. nnScaler gathers the sequence for it, with a warning: there, leave `ring_size` out.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nnscaler_ring.core.chunks import InChunks, WholeSequence
from nnscaler_ring.core.engine import attention_backward, attention_forward
from nnscaler_ring.core.kernels import AttentionKernel, BackwardTensors, Problem, select_kernel
from nnscaler_ring.core.op.checks import check_dropout_p, check_qkv, check_scale, check_window
from nnscaler_ring.core.plan.layout import Contiguous
from nnscaler_ring.core.plan.schedule import Mask, Schedule, Window
from nnscaler_ring.core.plan.span import even_edges, even_lens
from nnscaler_ring.core.scores.dropout import Dropout, seed_tensor
from nnscaler_ring.core.scores.scores import Scores
from nnscaler_ring.core.shape import AttentionShape
from nnscaler_ring.core.sums.row_sum import RowSum


def local_ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    chunks: int,
    causal: bool = True,
    window: int | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Compute attention to a whole sequence on this device, in the order of a ring.

    Args:
        q: [batch, tokens, num_heads, head_dim].
        k, v: [batch, tokens, num_kv_heads, head_dim]; num_kv_heads divides num_heads.
        chunks: at least 1; chunk c is tokens `[c*T//chunks, (c+1)*T//chunks)`.
        causal: a query sees no later key.
        window: keys that a query sees before itself, in tokens; None is all.
        dropout_p: dropout of probabilities, with the mask that `wrap_ring_attn_func` draws.

    Returns:
        out, as q. Memory beside q, k, v, out and their gradients is O(tokens / chunks).

    Raises:
        ValueError, TypeError: a wrong argument.
    """
    if chunks < 1:
        raise ValueError(f"chunks must be at least 1, got {chunks}.")
    check_qkv(q, k, v, packed=False)
    mask = check_window(causal, (-1 if window is None else window, -1))
    out: Tensor = _LocalRing.apply(
        q, k, v, chunks, mask.left, mask.right, check_dropout_p(dropout_p)
    )
    return out


class _LocalRing(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        chunks: int,
        left: int,
        right: int,
        dropout_p: float,
    ) -> Tensor:
        # A mask in two numbers, as nnScaler's tracer takes no other objects.
        ring = _Ring(q, k, v, chunks, Window(left, right), dropout_p)
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        lse = []
        for block, rows in enumerate(ring.rows):
            out[:, rows], block_lse = attention_forward(
                q[:, rows],
                k,
                v,
                exchange=ring.exchange(block),
                kernel=ring.kernel,
                scores=ring.scores(block),
            )
            lse.append(block_lse)
        ctx.save_for_backward(q, k, v, out, *lse)
        ctx.ring = ring
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *lse = ctx.saved_tensors
        ring = ctx.ring
        dq, dk, dv = torch.empty_like(q), RowSum(k), RowSum(v)
        for block, rows in enumerate(ring.rows):
            dq[:, rows], *_ = attention_backward(
                BackwardTensors(dout[:, rows], None, q[:, rows], k, v, out[:, rows], lse[block]),
                exchange=ring.exchange(block, dk, dv),
                kernel=ring.kernel,
                scores=ring.scores(block),
            )
        return dq, dk.current().to(k.dtype), dv.current().to(v.dtype), None, None, None, None


class _Ring:
    """Holds the chunks of one call, and the tiles between them."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, chunks: int, mask: Mask, dropout_p: float
    ) -> None:
        layout = Contiguous(even_lens(q.shape[1], chunks))
        self.rows = [slice(*edges) for edges in pairwise(even_edges(q.shape[1], chunks))]
        self.schedule = Schedule(layout, layout, mask)
        self.scale = check_scale(None, q.shape[-1])
        seed = seed_tensor(dropout_p, None)
        self.dropout = None if seed is None else Dropout(dropout_p, seed, 0, 0)
        problem = Problem.of(AttentionShape.of(q, k, v), dropout=dropout_p > 0)
        self.kernel: AttentionKernel = select_kernel("auto", problem)

    def scores(self, block: int) -> Scores:
        """Says how the queries of a chunk compute their scores."""
        return Scores(self.scale, self.schedule, block, dropout=self.dropout)

    def exchange(self, block: int, dk: RowSum | None = None, dv: RowSum | None = None) -> InChunks:
        """Brings the keys of all chunks to one of them, its own first."""
        return InChunks(WholeSequence(self.schedule, block, dk, dv), len(self.rows), first=block)
