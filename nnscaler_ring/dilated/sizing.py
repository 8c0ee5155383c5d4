"""How many ranks, how long messages and which segments: from the byte model of memory.py."""

from __future__ import annotations

from collections.abc import Sequence

from nnscaler_ring.core.op.checks import check_branches
from nnscaler_ring.core.plan.dilation import HeadOffsets
from nnscaler_ring.core.plan.span import even_lens
from nnscaler_ring.core.sizes import Sizes, dtype_name
from nnscaler_ring.dilated.memory import DilatedShape, predict_needs

GIB = 2**30
FIRST_SEGMENT = 2048

MESSAGES_AT_ONCE = 3
"""That come, or go, or are computed."""


def calculate_optimal_ring_size(
    seq_len: int,
    num_gpus: int,
    target_memory_per_gpu_gb: float = 40,
    *,
    num_heads: int,
    head_dim: int,
    num_kv_heads: int | None = None,
    dtype: str = "bfloat16",
    batch: int = 1,
    segment_lengths: Sequence[int] | None = None,
    dilation_rates: Sequence[int] | None = None,
    exchange: str = "direct",
    training: bool = True,
) -> int:
    """The fewest ranks whose share of one layer's dilated attention fits their memory.

    Args:
        target_memory_per_gpu_gb: GiB for one layer's attention on each rank; weights, other layers
            and what the optimizer keeps are apart.
        segment_lengths, dilation_rates: None: [2048, 4096, 8192] and [1, 2, 4].
        training: forward and backward; else forward alone.

    Raises:
        ValueError: num_gpus are too few; the message says what they would need.
    """
    _check_at_least_one(seq_len=seq_len, num_gpus=num_gpus)
    lengths = segment_lengths or (FIRST_SEGMENT, 2 * FIRST_SEGMENT, 4 * FIRST_SEGMENT)
    rates = dilation_rates or (1, 2, 4)
    check_branches(lengths, rates)
    sizes = Sizes(
        num_heads, num_kv_heads or num_heads, head_dim, head_dim, dtype_name(dtype), batch
    )

    def needed(ranks: int) -> int:
        shape = DilatedShape(
            tuple(lengths),
            tuple(rates),
            True,
            HeadOffsets(num_kv_heads=sizes.num_kv_heads),
            exchange,
            even_lens(seq_len, ranks),
            sizes,
        )
        # The last causal shard has everybody's keys to read.
        needs = predict_needs(shape, ranks - 1)
        return (needs.training if training else needs.forward).total

    target = target_memory_per_gpu_gb * GIB
    most = min(num_gpus, seq_len)
    if needed(most) > target:
        raise ValueError(
            f"num_gpus={num_gpus} are too few for {seq_len:,} tokens: each would hold "
            f"{needed(most) / GIB:.2f} GiB for a layer's attention, of {target_memory_per_gpu_gb} "
            "GiB; use more, a smaller batch, or fewer KV heads."
        )
    fewest, low = most, 1
    while low < fewest:  # memory falls with the ranks
        middle = (low + fewest) // 2
        if needed(middle) <= target:
            fewest = middle
        else:
            low = middle + 1
    return fewest


def optimize_block_size(
    ring_size: int,
    seq_len: int,
    *,
    num_heads: int,
    head_dim: int,
    num_kv_heads: int | None = None,
    dtype: str = "bfloat16",
    batch: int = 1,
    buffer_bytes: int = 2**28,
) -> int:
    """Keys per message, a power of two: as many as the buffers hold, at most a shard.

    The exchange chooses by itself (about 2,048 keys); this is for other programs.

    Args:
        buffer_bytes: for the messages under way at one time, three of keys and values.
    """
    _check_at_least_one(ring_size=ring_size, seq_len=seq_len, buffer_bytes=buffer_bytes)
    sizes = Sizes(
        num_heads, num_kv_heads or num_heads, head_dim, head_dim, dtype_name(dtype), batch
    )
    fitting = buffer_bytes // (MESSAGES_AT_ONCE * sizes.kv_numbers * sizes.itemsize)
    if fitting < 1:
        raise ValueError(
            f"buffer_bytes must hold {MESSAGES_AT_ONCE} messages of one key, "
            f"{MESSAGES_AT_ONCE * sizes.kv_numbers * sizes.itemsize} bytes, got {buffer_bytes}."
        )
    longest_shard = -(-seq_len // ring_size)
    most = min(fitting, longest_shard)
    return 1 << (most.bit_length() - 1)


def optimize_segment_lengths(seq_len: int, ring_size: int, num_segments: int = 3) -> list[int]:
    """Doubling segments that lie inside a shard, so that nothing but their ends travels.

    The first is a quarter of a shard, at most 2,048 tokens. Segments may also span shards, at the
    price that docs/dilated.md gives.
    """
    _check_at_least_one(seq_len=seq_len, ring_size=ring_size, num_segments=num_segments)
    shard = max(1, seq_len // ring_size)
    first = max(1, min(FIRST_SEGMENT, shard // 4))
    return [min(first * 2**n, shard) for n in range(num_segments)]


def _check_at_least_one(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {value!r}.")
