"""What cannot be is refused while code is generated, with our message, on the real nnScaler."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from nnscaler_ring import policies
from tests.nnscaler.models import BadCall
from tests.nnscaler.plans import AGAINST_DEVICE_ORDER, DENSE_DIMS, PACKED_DIMS, PLANS, Plan, split
from tests.nnscaler.runtime import nnscaler_ranks, parallelize
from tests.oracle import make_qkv
from tests.ranks import RankPool

SEQUENCE, HEADS_BY_SEQUENCE, SEQUENCE_BY_HEADS = (
    next(plan for plan in PLANS if plan.name == name)
    for name in ("sequence", "heads x sequence", "sequence x heads, strided")
)


def by_hand(graph: Any, _: Any, *, plan: Plan) -> Any:
    from nnscaler.ir.operator import IRFwOperation

    for node in graph.select(ntype=IRFwOperation):
        if "wrap_" in node.signature:
            split(graph, node, plan, PACKED_DIMS if "varlen" in node.signature else DENSE_DIMS)
        else:
            for device, part in enumerate(graph.replicate(node, plan.plan_ngpus)):
                graph.assign(part, device)
    return graph


def half_replicated(graph: Any, _: Any) -> Any:
    """Block 0 on device 0, block 1 on devices 1 and 2; device 3 has the whole sequence's output."""
    from nnscaler.ir.operator import IRFwOperation

    (node,) = graph.select(ntype=IRFwOperation)
    first, second = graph.partition(node, node.algorithm("dim"), idx=0, dim=1, num=2)
    graph.assign(first, 0)
    for device, part in enumerate(graph.replicate(second, 3), start=1):
        graph.assign(part, device)
    return graph


def refused(
    ranks: list[int], mistake: str, policy: Callable[..., Any], heads: tuple[int, int], tokens: int
) -> tuple[str, str]:
    """The error of parallelize() and what it was raised from."""
    q, k, v = make_qkv(0, 2, tokens, tokens, *heads, 4)
    dummy = {"q": q, "k": k, "v": v, "slopes": torch.zeros(4)}
    with nnscaler_ranks() as nnscaler:
        try:
            parallelize(nnscaler, BadCall(mistake), dummy, policy, len(ranks))
        except RuntimeError as error:
            return str(error), f"{type(error.__cause__).__name__}: {error.__cause__}"
    return "nothing", "was refused"


def check(
    pool: RankPool,
    policy: Callable[..., Any],
    message: str,
    *,
    mistake: str = "",
    heads: tuple[int, int] = (4, 2),
    tokens: int = 24,
) -> None:
    """Rank 0 generates the code and has our message; no rank waits for another."""
    first, *others = pool.run(pool.size, refused, mistake, policy, heads, tokens, timeout=30)
    assert message in first[1]
    assert {error for error, _ in (first, *others)} == {"Code generation failed."}


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("process_group", "ValueError: wrap_ring_attn_func: process_group must be None under"),
        ("shard_lens", "ValueError: wrap_ring_attn_func: shard_lens must be None under nnScaler"),
        ("alibi_slopes by position", "ValueError: alibi_slopes must be [4]"),
        ("softcap as a tensor", "softcap must not be a tensor under nnScaler"),
        ("bias in a packed call", "ValueError: bias must be [num_heads or 1, this rank"),
        ("seed of a part", "dropout_seed must be an int or None under nnScaler"),
        ("offsets of a part", "head_offsets must be 'mod' or 'block' under nnScaler"),
        ("window", "ValueError: window_size entries must be -1 or >= 0"),
        ("packed totals", "k must have q's tokens, [24], got [20]"),
        ("zigzag order", "layout must be 'contiguous' where nnScaler partitions the sequence"),
    ],
)
def test_mistakes(two_ranks: RankPool, mistake: str, message: str) -> None:
    check(two_ranks, partial(by_hand, plan=SEQUENCE), message, mistake=mistake)


def test_blocks_against_device_order(two_ranks: RankPool) -> None:
    check(two_ranks, partial(by_hand, plan=AGAINST_DEVICE_ORDER), "devices with higher numbers")


def test_one_kv_head_by_heads_first(four_ranks: RankPool) -> None:
    check(
        four_ranks,
        partial(by_hand, plan=HEADS_BY_SEQUENCE),
        "partition along the dimensions that k has first, and along the others last",
        heads=(4, 1),
    )


def test_sinks_by_sequence_first(four_ranks: RankPool) -> None:
    check(
        four_ranks,
        partial(by_hand, plan=SEQUENCE_BY_HEADS),
        "partition along the dimensions that sinks has first, and along the others last",
        mistake="sinks",
    )


def test_uneven_replicas(four_ranks: RankPool) -> None:
    check(four_ranks, half_replicated, "every block as many times as the others")


def test_indivisible_length(two_ranks: RankPool) -> None:
    check(
        two_ranks,
        policies.shard_sequence,
        "ValueError: wrap_ring_attn_func: tokens must divide by the 2 parts of the plan, got 23",
        tokens=23,
    )


def test_too_many_ways(four_ranks: RankPool) -> None:
    policy = partial(policies.shard_sequence_and_heads, ways=4)
    check(four_ranks, policy, "with grouped heads the KV heads must divide by it")
    policy = partial(policies.shard_sequence_and_batch, ways=3)
    check(four_ranks, policy, "ways must divide plan_ngpus, 4, got 3")
