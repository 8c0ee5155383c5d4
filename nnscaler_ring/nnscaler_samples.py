"""Inputs with which nnScaler's profiler times a call, or a part of one, on a single device.

nnScaler calls the public function with the sample in place of the node's inputs, by position, and
with the node's keywords. So a sample is q, k, v (and cu_seqlens); what a call has beside them, and
keys that lie on other ranks, comes with q: see `SampledQuery`.

Note [What a part is timed with]
    Whole calls and parts by batch or heads: tensors of their own shapes. Where the sequence is
    partitioned, the queries of the last block and the keys that they read: those of all blocks
    (zigzag, causal: half of them, as every rank does). The dilated op: the whole sequence and a
    share of the KV heads, which is what a rank computes on average; where the KV heads do not
    divide, one block. Packed documents are equally long, as many as the traced cu_seqlens have;
    nnScaler keeps no values of tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nnscaler_ring.core.op.ops import attention_op
from nnscaler_ring.core.op.options import arguments_of, split_arguments


def dense_sample(
    node: Any, optional: Sequence[str], *, causal_zigzag: bool = False
) -> tuple[Tensor, ...]:
    """q, k and v of a dense node; `optional` names its inputs after them."""
    q, k, v, *others = node.inputs()
    local, whole = q.shape[1], q.parent.shape[1]
    keys = (whole + local) // 2 if causal_zigzag else whole
    extras = {}
    for name, x in zip(optional, others, strict=True):
        shape = [*x.shape[:-1], keys] if name == "bias" else list(x.shape)
        extras[name] = _optional_tensor(name, x, shape)
    sample = _random(q, q.shape), _random(k, k.shape), _random(v, v.shape)
    return SampledQuery.of(sample[0], keys, extras), *sample[1:]


def dilated_sample(node: Any) -> tuple[Tensor, ...]:
    """q, k and v of a dilated node."""
    q = node.input(0)
    local, whole = q.shape[1], q.parent.shape[1]
    blocks = whole // local
    if blocks == 1 or node.input(1).shape[2] % blocks:
        return tuple(_random(x, x.shape) for x in node.inputs())
    return tuple(
        _random(x, [x.shape[0], whole, x.shape[2] // blocks, x.shape[3]]) for x in node.inputs()
    )


def packed_sample(node: Any, optional: Sequence[str]) -> tuple[Tensor, ...]:
    """q, k, v, cu_seqlens_q and cu_seqlens_k of a packed node."""
    q, k, v, cu_q, cu_k, *others = node.inputs()
    local, whole = q.shape[0], q.parent.shape[0]
    documents = cu_q.shape[0] - 1
    ends = torch.arange(documents + 1) * whole // max(documents, 1)
    extras = {
        name: _optional_tensor(name, x, x.shape) for name, x in zip(optional, others, strict=True)
    }
    return (
        SampledQuery.of(_random(q, q.shape), whole, extras),
        _random(k, [whole, *k.shape[1:]]),
        _random(v, [whole, *v.shape[1:]]),
        (ends - (whole - local)).clamp(min=0).to(cu_q.dtype),
        ends.to(cu_k.dtype),
    )


def rows_sample(node: Any) -> tuple[Tensor, ...]:
    """The tensor and the cu_seqlens of a node that moves rows, which one device does not."""
    x, cu_seqlens = node.inputs()
    return _random(x, x.shape), torch.zeros(cu_seqlens.shape, dtype=cu_seqlens.dtype)


def _random(x: Any, shape: Sequence[int]) -> Tensor:
    # current_device() is nnScaler's own way to the device; nnscaler_on_cpu() makes it the CPU.
    sample = torch.randn(list(shape), dtype=x.dtype, device=torch.cuda.current_device())
    return sample.requires_grad_(x.requires_grad)


def _optional_tensor(name: str, x: Any, shape: Sequence[int]) -> Tensor:
    sample = _random(x, shape)
    # nnScaler gives every float input a gradient; slopes have none.
    return sample.detach() if name == "alibi_slopes" else sample


class SampledQuery(Tensor):
    """q of a sample, which also stands for what the public function cannot be given by position.

    `keys`: attention must cost what it costs with so many keys, though k of a dense call is as
    long as q. `extras`: the optional tensors of the call, by name.
    """

    keys: int
    extras: dict[str, Tensor]

    @staticmethod
    def of(q: Tensor, keys: int, extras: dict[str, Tensor]) -> SampledQuery:
        """q, standing for a call with so many keys and these tensors."""
        sample = q.as_subclass(SampledQuery)
        sample.keys, sample.extras = keys, extras
        return sample

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.nnscaler_ring.attention.default:
            return _attend(*args)
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, SampledQuery):
            source = next(x for x in args if isinstance(x, SampledQuery))
            result.keys, result.extras = source.keys, source.extras
        return result


def _attend(q: SampledQuery, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """The op that the sample stands for."""
    extras, options = split_arguments(others)
    extras = extras._replace(**q.extras)
    bias = extras.bias
    options = options._replace(bias_gradient=bias is not None and bias.requires_grad)
    query = q.as_subclass(Tensor)
    if q.keys == k.shape[-3] or q.dim() == 3:
        return attention_op(query, k, v, *extras, *arguments_of(options))
    results = [
        _with_more_keys(q.keys, query[rows], k[rows], v[rows], extras_of_rows, options)
        for rows, extras_of_rows in _documents(extras, len(query))
    ]
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def _documents(extras: Any, batch: int) -> Iterator[tuple[slice, Any]]:
    """Rows of the batch that one packed call can hold as documents, with their own extras."""
    slopes, bias = extras.alibi_slopes, extras.bias
    if slopes is not None and slopes.dim() == 2:
        extras = extras._replace(alibi_slopes=slopes[0])
    if bias is None:
        yield slice(None), extras
        return
    # The bias of a packed call is for all pairs of its documents, so each row is a call.
    for row in range(batch):
        of_row = bias if bias.dim() == 3 else bias[row % bias.shape[0]]
        yield slice(row, row + 1), extras._replace(bias=of_row)


def _with_more_keys(
    keys: int, q: Tensor, k: Tensor, v: Tensor, extras: Any, options: Any
) -> tuple[Tensor, ...]:
    """A dense call as a packed one, whose documents have more keys than queries."""
    batch, local = q.shape[:2]
    copies = -(-keys // local)
    long_k, long_v = (x.repeat(1, copies, 1, 1)[:, :keys].flatten(0, 1) for x in (k, v))
    cu_q, cu_k = (torch.arange(batch + 1) * tokens for tokens in (local, keys))
    extras = extras._replace(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    options = options._replace(compute_len=batch * local)
    out, lse, *_ = attention_op(q.flatten(0, 1), long_k, long_v, *extras, *arguments_of(options))
    return out.unflatten(0, (batch, local)), lse.unflatten(1, (batch, local)).transpose(0, 1)
