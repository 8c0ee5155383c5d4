"""Dilated attention as torch.library ops. A group goes in as a string, as in ops.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnscaler_ring.core.dilated import DilatedPlan, dilated_backward, dilated_forward
from nnscaler_ring.core.kernels import AttentionKernel, Problem, select_kernel
from nnscaler_ring.core.op.call import describe, tag_of
from nnscaler_ring.core.op.prepare import lens_of_blocks, transport_of
from nnscaler_ring.core.plan.dilation import Branch, HeadOffsets
from nnscaler_ring.core.plan.schedule import CAUSAL, FULL
from nnscaler_ring.core.ranks.agreement import agree, refusing_together
from nnscaler_ring.core.ranks.calls import Pass
from nnscaler_ring.core.ranks.groups import find_place
from nnscaler_ring.core.ranks.transport import Transport, connect
from nnscaler_ring.core.shape import AttentionShape
from nnscaler_ring.core.sums.online_softmax import accumulation_dtype


class DilatedOptions(NamedTuple):
    """What the op takes beside q, k, v, in the order of `OPTIONS_SCHEMA`.

    `shard_lens` None: equal shards. The three after `causal` are a `HeadOffsets`. `chunks`: parts
    that keys come in, 1 with a group.
    """

    op: str
    group: str
    shard_lens: Sequence[int] | None
    segment_lengths: Sequence[int]
    dilation_rates: Sequence[int]
    causal: bool
    head_offsets: str
    first_kv_head: int
    all_kv_heads: int
    softmax_scale: float
    exchange: str
    kernel: str
    chunks: int = 1
    wants_gradient: bool = False


OPTIONS_SCHEMA = (
    "str op, str group, SymInt[]? shard_lens, int[] segment_lengths, int[] dilation_rates, "
    "bool causal, str head_offsets, int first_kv_head, SymInt all_kv_heads, float softmax_scale, "
    "str exchange, str kernel, int chunks, bool wants_gradient"
)

FORWARD_SCHEMA = (
    f"(Tensor q, Tensor k, Tensor v, {OPTIONS_SCHEMA}) -> "
    "(Tensor out, Tensor softmax_lse, Tensor number)"
)

BACKWARD_SCHEMA = (
    "(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    f"Tensor number, {OPTIONS_SCHEMA}) -> (Tensor dq, Tensor dk, Tensor dv)"
)


@dataclass(frozen=True)
class DilatedCall:
    """One call, the same on all ranks of its group."""

    op: str
    block_order: tuple[int, ...]
    shard_lens: tuple[int, ...]
    shape: AttentionShape
    softmax_scale: float
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    causal: bool
    head_offsets: HeadOffsets
    exchange: str
    kernel: str


@lru_cache(maxsize=256)
def plan_dilated(call: DilatedCall, block: int) -> DilatedPlan:
    """The plan of the rank that holds `block`."""
    return DilatedPlan.of(
        [Branch(*pair) for pair in zip(call.segment_lengths, call.dilation_rates, strict=True)],
        call.head_offsets,
        call.shape.num_kv_heads,
        call.shard_lens,
        CAUSAL if call.causal else FULL,
        call.exchange,
        block,
    )


@torch.library.custom_op("nnscaler_ring::dilated_attention", mutates_args=(), schema=FORWARD_SCHEMA)
def dilated_attention_op(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """Dilated attention of this rank's contiguous shards, and the number of the call on the CPU."""
    run = _prepare(q, k, v, DilatedOptions(*others))
    with run.entered:
        results = dilated_forward(q, k, v, transport=run.transport(), **run.how())
        return *results, torch.full((1,), run.entered.number)


@dilated_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
    batch, tokens, num_heads, _ = q.shape
    lse_dtype = accumulation_dtype(q.dtype)
    return (
        q.new_empty(batch, tokens, num_heads, v.shape[-1]),
        q.new_empty(batch, num_heads, tokens, dtype=lse_dtype),
        torch.empty(1, dtype=torch.int64),
    )


@torch.library.custom_op(
    "nnscaler_ring::dilated_attention_backward", mutates_args=(), schema=BACKWARD_SCHEMA
)
def dilated_attention_backward_op(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    number: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of this rank's rows."""
    run = _prepare(q, k, v, DilatedOptions(*others), int(number.item()))
    with run.entered:
        return dilated_backward(
            torch.zeros_like(out) if dout is None else dout,
            None if dlse is None else dlse.to(softmax_lse.dtype),
            q,
            k,
            v,
            out,
            softmax_lse,
            transport=run.transport(),
            **run.how(),
        )


@dilated_attention_backward_op.register_fake
def _(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, *ctx.options = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    rest = (None,) * len(ctx.options)
    if dout is None and dlse is None:
        return (None, None, None, *rest)
    saved = ctx.saved_tensors  # once: a checkpoint gives them out once
    return (*dilated_attention_backward_op(dout, dlse, *saved, *ctx.options), *rest)


dilated_attention_op.register_autograd(_gradients, setup_context=_save_for_backward)


class _Run(NamedTuple):
    """A call on this rank, agreed on and ready to go."""

    options: DilatedOptions
    call: DilatedCall
    block: int
    kernel: AttentionKernel
    entered: Pass

    def transport(self) -> Transport:
        """For the messages of the pass."""
        return transport_of(find_place(self.options.group), self.entered)

    def how(self) -> dict[str, Any]:
        """The keyword arguments of both passes."""
        return {
            "plan": plan_dilated(self.call, self.block),
            "kernel": self.kernel,
            "softmax_scale": self.options.softmax_scale,
            "chunks": self.options.chunks,
        }


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, options: DilatedOptions, number: int | None = None
) -> _Run:
    """Plan the call and agree on it with the other ranks; nothing has moved before that.

    `number`: of the call whose backward pass this is; None in the forward pass.
    """
    place = find_place(options.group)
    with refusing_together(options.group, options.op):
        call = DilatedCall(
            op=options.op,
            block_order=place.members,
            shard_lens=lens_of_blocks("shard_lens", options.shard_lens, place, q.shape[1]),
            shape=AttentionShape.of(q, k, v),
            softmax_scale=options.softmax_scale,
            segment_lengths=tuple(options.segment_lengths),
            dilation_rates=tuple(options.dilation_rates),
            causal=options.causal,
            head_offsets=HeadOffsets(
                options.head_offsets, options.first_kv_head, options.all_kv_heads
            ),
            exchange=options.exchange,
            kernel=options.kernel,
        )
        kernel = select_kernel(call.kernel, Problem.of(call.shape))
        plan_dilated(call, place.block)
    entered = agree(
        options.group,
        (call, options.wants_gradient),
        options.op,
        lambda: {**describe(call), "wants_gradient": str(options.wants_gradient)},
        tag=_tag_of(call),
        direction="forward" if number is None else "backward",
        number=number,
    )
    connect(options.group, q.device)
    return _Run(options, call, place.block, kernel, entered)


_tag_of = lru_cache(maxsize=256)(tag_of)
