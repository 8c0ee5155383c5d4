"""From the arguments of an attention op to a call that all ranks agree on, ready to go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from nnscaler_ring.core.kernels import AttentionKernel, Problem, select_kernel
from nnscaler_ring.core.op.call import Call, Plan, describe, plan_call
from nnscaler_ring.core.op.checks import check_bias_keys, check_own_length
from nnscaler_ring.core.op.documents import documents_of, total_of
from nnscaler_ring.core.op.options import Extras, Options
from nnscaler_ring.core.plan.masks import mask_of
from nnscaler_ring.core.ranks.agreement import agree, refusing_together
from nnscaler_ring.core.ranks.calls import Pass
from nnscaler_ring.core.ranks.groups import Place, find_place
from nnscaler_ring.core.ranks.transport import Transport, connect
from nnscaler_ring.core.scores.dropout import Dropout
from nnscaler_ring.core.scores.scores import Scores
from nnscaler_ring.core.shape import AttentionShape


class Run(NamedTuple):
    """One pass of an attention call on this rank, agreed on and ready to go."""

    place: Place
    plan: Plan
    kernel: AttentionKernel
    options: Options
    entered: Pass

    def transport(self) -> Transport:
        """For the messages of the pass."""
        return transport_of(self.place, self.entered)

    def scores(self, extras: Extras, bias: Tensor | None, seed: Tensor | None) -> Scores:
        """For one pass; bias [batch or 1, num_heads or 1, computed rows, all keys]."""
        options, slopes = self.options, extras.alibi_slopes
        dropout = None
        if options.dropout_p and seed is not None:
            dropout = Dropout(options.dropout_p, seed, options.first_batch, options.first_head)
        return Scores(
            options.softmax_scale,
            self.plan.schedule,
            self.place.block,
            softcap=options.softcap,
            alibi_slopes=None if slopes is None else slopes.view(-1, slopes.shape[-1]),
            bias=bias,
            needs_dbias=options.bias_gradient,
            dropout=dropout,
        )


def prepare(
    rows: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extras: Extras,
    options: Options,
    *,
    lse_gradient: bool | None = None,
    number: int | None = None,
) -> Run:
    """Plan the call and agree on it with the other ranks; nothing has moved before that.

    `rows`: this rank's query rows as the caller holds them; q may have them as computed.
    `lse_gradient`: whether a gradient of softmax_lse comes in; None in the forward pass.
    `number`: of the call whose backward pass this is; None in the forward pass.
    """
    place = find_place(options.group)
    with refusing_together(options.group, options.op):
        call = call_of(rows, q, k, v, extras, options, place, lse_gradient)
        kernel = select_kernel(options.kernel, _problem(call))
        plan = plan_call(call, place.block)
    entered = agree(
        options.group,
        (call, options.wants_gradient),
        options.op,
        lambda: {**describe(call), "wants_gradient": str(options.wants_gradient)},
        tag=plan.tag,
        direction="forward" if number is None else "backward",
        number=number,
    )
    connect(options.group, q.device)
    return Run(place, plan, kernel, options, entered)


def call_of(
    rows: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extras: Extras,
    options: Options,
    place: Place,
    lse_gradient: bool | None = None,
) -> Call:
    """What the ranks must agree on; the arguments are those of `prepare`."""
    documents_q, documents_k = (
        None if cu is None else documents_of(cu)
        for cu in (extras.cu_seqlens_q, extras.cu_seqlens_k)
    )
    moved = options.caller_layout != options.compute_layout
    lens = lens_of_blocks("shard_lens", options.shard_lens, place, rows)
    lens_k = options.shard_lens_k
    if lens_k is None and (documents_k is None or total_of(documents_k) == sum(lens)):
        lens_k = lens
    lens_k = lens_of_blocks("shard_lens_k", lens_k, place, rows if moved else k.shape[-3])
    bias, slopes = extras.bias, extras.alibi_slopes
    if bias is not None:
        check_bias_keys(bias, sum(lens_k))
    return Call(
        op=options.op,
        block_order=place.members,
        shard_lens=lens,
        shard_lens_k=lens_k,
        shape=AttentionShape.of(q, k, v),
        softmax_scale=options.softmax_scale,
        mask=mask_of(options.mask).text,
        softcap=options.softcap,
        alibi_slopes=None if slopes is None else tuple(slopes.shape),
        bias=None if bias is None else (*bias.shape[:-2], bias.dtype),
        bias_gradient=options.bias_gradient,
        sinks=extras.sinks is not None,
        dropout_p=options.dropout_p,
        dropout_seed="given" if options.same_seed else "drawn",
        # Its rows move where the layouts differ; elsewhere it is each rank's own affair.
        lse_gradient=lse_gradient if moved else None,
        caller_layout=options.caller_layout,
        compute_layout=options.compute_layout,
        exchange=options.exchange,
        kernel=options.kernel,
        deterministic=options.deterministic,
        cu_seqlens_q=documents_q,
        cu_seqlens_k=documents_k,
    )


def _problem(call: Call) -> Problem:
    return Problem.of(
        call.shape,
        deterministic=call.deterministic,
        softcap=call.softcap > 0,
        alibi=call.alibi_slopes is not None,
        bias=call.bias is not None,
        dropout=call.dropout_p > 0,
    )


def lens_of_blocks(
    name: str, lens: Sequence[int] | None, place: Place, rows: int
) -> tuple[int, ...]:
    """The rows of every block; None means that all have as many as this one."""
    if lens is None:
        return (rows,) * place.world_size
    check_own_length(name, lens, place.block, rows)
    return tuple(lens)


def transport_of(place: Place, entered: Pass) -> Transport:
    """For the messages of one pass over a group."""
    op = f"{entered.op} {entered.direction}"
    return Transport(place, entered.traffic, op, entered.tag, entered=entered)
