"""The byte model against counted bytes, and the helpers that use it."""

import itertools
import random
from functools import partial

import pytest
import torch
import torch.distributed as dist

from nnscaler_ring import wrap_dilated_attn_func
from nnscaler_ring.core.plan.dilation import HeadOffsets
from nnscaler_ring.core.sizes import Sizes
from nnscaler_ring.dilated import (
    calculate_optimal_ring_size,
    optimize_block_size,
    optimize_segment_lengths,
)
from nnscaler_ring.dilated.memory import DilatedShape, predict_needs
from nnscaler_ring.dilated.sizing import GIB
from nnscaler_ring.tools.demo.memory import count_tensor_bytes

BRANCHES = ((128, 256, 4096), (1, 2, 16))


def shape_of(lens, heads, dtype, branches=BRANCHES, causal=True, exchange="direct"):
    sizes = Sizes(*heads, 16, 16, dtype)
    return DilatedShape(
        *branches, causal, HeadOffsets(num_kv_heads=heads[1]), exchange, tuple(lens), sizes
    )


def counted(ranks, shape):
    """Bytes of live tensors at the peak: forward, then forward and backward."""
    block = 0 if ranks is None else ranks.index(dist.get_rank())

    def run(training):
        sizes, tokens = shape.sizes, shape.shard_lens[block]
        with torch.set_grad_enabled(training):
            q, k, v = (
                torch.zeros(1, tokens, h, 16, dtype=sizes.torch_dtype, requires_grad=training)
                for h in (sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads)
            )
            out = wrap_dilated_attn_func(
                q,
                k,
                v,
                shape.segment_lengths,
                shape.dilation_rates,
                causal=shape.causal,
                process_group=ranks,
                shard_lens=list(shape.shard_lens),
                exchange=shape.exchange,
            )
            if training:
                out.backward(torch.ones_like(out))

    run(True)  # what the first call makes and keeps
    return [count_tensor_bytes(partial(run, training)).peak for training in (False, True)]


CASES = [
    ([2048], (4, 4), "float32"),
    ([2048], (4, 2), "bfloat16"),
    ([1024, 1024, 1024], (4, 4), "float32"),
    ([1000, 0, 1500], (8, 4), "bfloat16"),
]


@pytest.mark.parametrize("exchange", ["direct", pytest.param("all_gather", marks=pytest.mark.full)])
@pytest.mark.parametrize(("lens", "heads", "dtype"), CASES, ids=str)
def test_predicted_bytes_hold_what_is_counted(pool, lens, heads, dtype, exchange):
    """Never less than is counted, and at most twice as much."""
    shape = shape_of(lens, heads, dtype, exchange=exchange)
    if len(lens) == 1:
        found = [counted(None, shape)]
    else:
        found = pool.run(len(lens), counted, shape)
    for block, (forward, training) in enumerate(found):
        needs = predict_needs(shape, block)
        if lens[block]:
            assert forward <= needs.forward.total <= 2 * forward, block
            assert training <= needs.training.total <= 2 * training, block


def test_memory_per_rank_falls_with_the_ranks(pool):
    """At a fixed number of tokens, half of the shard is half of the counted bytes."""
    peaks = {}
    for ranks in (1, 2, 4):
        shape = shape_of([4096 // ranks] * ranks, (4, 4), "float32")
        peaks[ranks] = max(training for _, training in pool.run(ranks, counted, shape))
    for ranks in (2, 4):
        # The rest is messages and the rows of segments that span shards.
        assert peaks[1] / ranks <= peaks[ranks] <= 1.35 * peaks[1] / ranks, peaks


def test_messages_of_a_spanning_branch_do_not_grow():
    """With w / r constant a branch over all shards needs the same buffers, however long."""
    sizes = set()
    for tokens in (2**10, 2**12, 2**14):
        shape = shape_of([tokens] * 4, (4, 4), "float32", branches=((4 * tokens,), (tokens // 64,)))
        sizes.add(max(predict_needs(shape, block).messages for block in range(4)))
    assert len(sizes) == 1 and sizes.pop() > 0


# Helpers.


def test_ring_size_is_the_fewest_ranks_that_fit():
    random.seed(0)
    for _ in range(5):
        tokens, heads = random.randrange(10**5, 10**6), random.choice((4, 8))
        gigabytes = random.uniform(1.0, 4.0)
        size = calculate_optimal_ring_size(
            tokens,
            64,
            gigabytes,
            num_heads=heads,
            head_dim=64,
            segment_lengths=[2048, 8192],
            dilation_rates=[1, 4],
        )

        def needed(ranks, tokens=tokens, heads=heads):
            lens = [n * tokens // ranks for n in range(ranks + 1)]
            shape = DilatedShape(
                (2048, 8192),
                (1, 4),
                True,
                HeadOffsets(num_kv_heads=heads),
                "direct",
                tuple(b - a for a, b in itertools.pairwise(lens)),
                Sizes(heads, heads, 64, 64, "bfloat16"),
            )
            return predict_needs(shape, ranks - 1).training.total

        assert needed(size) <= gigabytes * GIB
        assert size == 1 or needed(size - 1) > gigabytes * GIB


def test_ring_size_counts_heads_and_dtype():
    """10M tokens on 32 GPUs of 40 GB, for two models."""
    small = calculate_optimal_ring_size(10_000_000, 32, num_heads=12, head_dim=64)
    wide = calculate_optimal_ring_size(10_000_000, 64, num_heads=12, head_dim=64, dtype="float32")
    assert 1 < small < wide
    with pytest.raises(ValueError, match="num_gpus=2 are too few for 10,000,000 tokens"):
        calculate_optimal_ring_size(10_000_000, 2, num_heads=32, head_dim=128)


@pytest.mark.parametrize("ring_size", [1, 3, 8])
@pytest.mark.parametrize("tokens", [1, 100, 4096, 10**6])
def test_block_size_fits_buffers_and_shard(ring_size, tokens):
    options = {"num_heads": 8, "head_dim": 64, "buffer_bytes": 2**22}
    block = optimize_block_size(ring_size, tokens, **options)
    assert block <= -(-tokens // ring_size)
    assert 3 * block * 2 * 8 * 64 * 2 <= 2**22
    grouped = optimize_block_size(ring_size, tokens, num_kv_heads=2, **options)
    assert block <= grouped <= 4 * block
    with pytest.raises(ValueError, match="buffer_bytes must hold 3 messages of one key"):
        optimize_block_size(ring_size, tokens, **{**options, "buffer_bytes": 100})


def test_segment_lengths():
    assert optimize_segment_lengths(1_000_000, 8) == [
        2048,
        4096,
        8192,
    ]  # of docs/origins.md
    assert optimize_segment_lengths(100, 4, 4) == [6, 12, 24, 25]
    assert optimize_segment_lengths(3, 8, 2) == [1, 1]
    with pytest.raises(ValueError, match="ring_size must be an int of at least 1, got 0"):
        optimize_segment_lengths(10, 0)
