"""What an attention op takes beside q, k, v: tensors (`Extras`) and plain values (`Options`).

Note [Few arguments]
    For an op with gradients torch lists all arguments of its schema once per argument, in every
    call: with 28 of them that took two thirds of the host's time of a forward pass. So names and
    flags go in as one string, and counts as one list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Options(NamedTuple):
    """What an attention op takes beside its tensors.

    `shard_lens` None: equal shards. `compute_len`: this rank's query rows in `compute_layout`.
    `mask`: its text. `bias_gradient`: bias wants one;
    `wants_gradient`: any of the tensors does, so that a backward pass may follow.
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
    mask: str
    softcap: float
    bias_gradient: bool
    dropout_p: float
    same_seed: bool
    first_batch: int
    first_head: int
    exchange: str
    kernel: str
    deterministic: bool
    wants_gradient: bool


OPTIONS_SCHEMA = (
    "str names, SymInt[] counts, SymInt[]? shard_lens, SymInt[]? shard_lens_k, "
    "float softmax_scale, float softcap, float dropout_p"
)

NAMES = ("op", "caller_layout", "compute_layout", "mask", "exchange", "kernel")
FLAGS = ("bias_gradient", "same_seed", "deterministic", "wants_gradient")
COUNTS = ("compute_len", "first_batch", "first_head")


def arguments_of(options: Options) -> tuple[Any, ...]:
    """The options as OPTIONS_SCHEMA has them: Note [Few arguments]."""
    # The group comes last: its name is torch's or the user's and may hold any character.
    names = (
        *(getattr(options, name) for name in NAMES),
        *("1" if getattr(options, flag) else "" for flag in FLAGS),
        options.group,
    )
    return (
        "\n".join(names),
        [getattr(options, count) for count in COUNTS],
        options.shard_lens,
        options.shard_lens_k,
        options.softmax_scale,
        options.softcap,
        options.dropout_p,
    )


def _options_of(
    names: str,
    counts: Sequence[int],
    shard_lens: Sequence[int] | None,
    shard_lens_k: Sequence[int] | None,
    softmax_scale: float,
    softcap: float,
    dropout_p: float,
) -> Options:
    *texts, group = names.split("\n", len(NAMES) + len(FLAGS))
    flags = (text == "1" for text in texts[len(NAMES) :])
    named: dict[str, Any] = dict(zip(NAMES, texts, strict=False))
    named |= dict(zip(FLAGS, flags, strict=True)) | dict(zip(COUNTS, counts, strict=True))
    return Options(
        group=group,
        shard_lens=shard_lens,
        shard_lens_k=shard_lens_k,
        softmax_scale=softmax_scale,
        softcap=softcap,
        dropout_p=dropout_p,
        **named,
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
    return Extras(*others[:count]), _options_of(*others[count:])
