"""What an attention op takes beside q, k, v: tensors (`Extras`) and plain values (`Options`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Options(NamedTuple):
    """What an attention op takes beside its tensors, in the order of `OPTIONS_SCHEMA`.

    `shard_lens` None: equal shards. `compute_len`: this rank's query rows in `compute_layout`.
    `left` and `right`: the mask, in tokens, UNBOUNDED for none. `bias_gradient`: bias wants one.
    `same_seed`: the caller gave dropout_seed, so all ranks must hold the same. `first_batch` and
    `first_head`: as in `DropoutSeed`.
    """

    op: str
    group: str
    shard_lens: Sequence[int] | None
    shard_lens_k: Sequence[int] | None
    caller_layout: str
    compute_layout: str
    compute_len: int
    softmax_scale: float
    left: int
    right: int
    softcap: float
    bias_gradient: bool
    dropout_p: float
    same_seed: bool
    first_batch: int
    first_head: int
    exchange: str
    kernel: str
    deterministic: bool


OPTIONS_SCHEMA = (
    "str op, str group, SymInt[]? shard_lens, SymInt[]? shard_lens_k, str caller_layout, "
    "str compute_layout, SymInt compute_len, float softmax_scale, SymInt left, SymInt right, "
    "float softcap, bool bias_gradient, float dropout_p, bool same_seed, SymInt first_batch, "
    "SymInt first_head, str exchange, str kernel, bool deterministic"
)


class Extras(NamedTuple):
    """Tensors that an attention op takes beside q, k, v, in the order of `EXTRAS_SCHEMA`."""

    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    alibi_slopes: Tensor | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    dropout_seed: Tensor | None = None


EXTRAS_SCHEMA = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? alibi_slopes, Tensor? bias, "
    "Tensor? sinks, Tensor? dropout_seed"
)


def split_arguments(others: Sequence[Any]) -> tuple[Extras, Options]:
    """An op's arguments after its tensors, as the schemas have them."""
    count = len(Extras._fields)
    return Extras(*others[:count]), Options(*others[count:])
