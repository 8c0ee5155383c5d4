"""What two ranks that do not agree are told: the argument, the ranks, both values."""

from __future__ import annotations

from collections.abc import Mapping

from nnscaler_ring.core.plan.tile import UNBOUNDED

ARGUMENTS = {
    "mask": "the mask (causal, window_size or mask)",
    "shard_lens": "shard_lens (None: every block has as many tokens as the own)",
    "shard_lens_k": "shard_lens_k (None: every block has as many tokens as the own)",
    "batch": "batch, a dimension of q",
    "num_heads": "num_heads, a dimension of q",
    "num_kv_heads": "num_kv_heads, a dimension of k and v",
    "head_dim": "head_dim, a dimension of q and k",
    "v_head_dim": "v_head_dim, a dimension of v",
    "alibi_slopes": "the shape of alibi_slopes",
    "bias": "bias, its dtype and its sizes without rows and keys",
    "bias_gradient": "whether bias requires a gradient",
    "wants_gradient": "whether any of q, k, v, bias and sinks wants a gradient",
    "sinks": "whether sinks are given",
    "dropout_seed": "whether dropout_seed is given",
    "lse_gradient": "whether the loss uses softmax_lse (add 0.0 * softmax_lse where it does not)",
    "caller_layout": "layout",
    "head_offsets": "head_offsets (num_kv_heads None: those of k)",
    "other_sizes": "the other dimensions of x",
}
"""How messages call the fields of a description that are not called as the user's arguments."""

READABLE_CHARACTERS = 200
"""Two lists longer than this together are shown by their first difference."""


def first_difference(
    rank: int, mine: Mapping[str, str], other_rank: int, other: Mapping[str, str]
) -> str | None:
    """The first argument that both have and that differs, in a sentence; None if none does."""
    for name, value in mine.items():
        if name in other and other[name] != value:
            here, there = contrast(value, other[name])
            return (
                f"ranks disagree on {ARGUMENTS.get(name, name)}: rank {rank} has {here}, "
                f"rank {other_rank} has {there}; pass the same on all ranks of the group"
            )
    return None


def contrast(mine: str, other: str) -> tuple[str, str]:
    """Two values as text, for a message: long lists by their length and first difference."""
    mine, other = (x.replace(str(UNBOUNDED), "unbounded") for x in (mine, other))
    lists = [x.startswith("[") and x.endswith("]") for x in (mine, other)]
    if not all(lists) or len(mine) + len(other) <= READABLE_CHARACTERS:
        return mine, other
    here, there = (x[1:-1].split(", ") for x in (mine, other))
    differ = (n for n, pair in enumerate(zip(here, there, strict=False)) if pair[0] != pair[1])
    first = next(differ, min(len(here), len(there)))

    def text(values: list[str]) -> str:
        value = values[first] if first < len(values) else "nothing"
        return f"{len(values)} entries with {value} at index {first}"

    return text(here), text(there)
