"""Ranks compare new plans before anything moves: who is wrong, or different, is named in time."""

import re
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from nnscaler_ring import (
    set_agreement_timeout,
    wrap_ring_attn_func,
    wrap_ring_attn_varlen_func,
    wrap_zigzag_attn_func,
    zigzag_shard,
    zigzag_unshard,
)
from nnscaler_ring.core.ranks.groups import (
    PLANS_REMEMBERED,
    GroupState,
    group_of,
    group_state,
    group_string,
)
from tests.core.attempts import (
    TOKENS,
    Attempt,
    arguments,
    attempt,
    check_correct_call,
    line_up,
    warm_up,
)
from tests.core.op.test_checks import Change, changed, given, narrowed
from tests.ranks import run_fresh

RING, ZIGZAG, VARLEN = wrap_ring_attn_func, wrap_zigzag_attn_func, wrap_ring_attn_varlen_func


def shard(x=None, process_group=None, **options):
    """`zigzag_shard`, with arguments like those of attention."""
    return zigzag_shard(torch.zeros(2, TOKENS, 3) if x is None else x, process_group, **options)


def unshard(process_group=None, **options):
    return zigzag_unshard(torch.zeros(2, TOKENS, 3), process_group, **options)


def qkv(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """All three tensors changed."""
    return changed(q=change, k=change, v=change)


def equal_shards(good: dict[str, Any]) -> dict[str, Any]:
    return {"shard_lens": [TOKENS] * len(good["ranks"])}


def thousands(second: int) -> Change:
    """5000 documents, all but two of them empty."""
    return lambda good: {
        "cu_seqlens_q": torch.tensor([0, second, *[1] * 4998, TOKENS * len(good["ranks"])]),
        "cu_seqlens_k": torch.tensor([0, *[1] * 4999, TOKENS * len(good["ranks"])]),
    }


class Case(NamedTuple):
    """The rank of the last block changes its arguments, or calls another function."""

    op: Callable[..., Any]
    change: Change
    expected: str | tuple[str, str, str]  # a refusal, or an argument and its two values
    other: Callable[..., Any] | None = None
    common: Change = given()


def whole_bias(good: dict[str, Any]) -> torch.Tensor:
    """A bias that fits the good arguments of a group."""
    return torch.zeros(1, 1, TOKENS, TOKENS * len(good["ranks"]))


REFUSED = {
    # Found in the public function.
    "window_size": Case(
        RING, given(window_size=(-2, 0)), r"ValueError: window_size entries must be .*\(-2, 0\)"
    ),
    "layout": Case(ZIGZAG, given(layout="x"), "ValueError: layout must be 'contiguous' or"),
    "bias": Case(
        VARLEN, given(bias=torch.zeros(1)), r"ValueError: bias must be \[num_heads or 1, this"
    ),
    "dtype of k": Case(
        RING, changed(k=lambda x: x.float()), "ValueError: k must have q's dtype, torch.float64"
    ),
    "causal": Case(ZIGZAG, given(causal=1), "TypeError: causal must be True or False, got 1"),
    "dim": Case(shard, given(dim=7), "ValueError: dim must be a dimension of x, .* got 7"),
    # Found inside the op.
    "cu_seqlens": Case(
        VARLEN,
        changed(cu_seqlens_q=lambda x: x.clamp(max=3)),
        "ValueError: cu_seqlens_q must end at the tokens of all shards together, [0-9]+, got 3",
    ),
    "own shard length": Case(
        RING,
        qkv(lambda x: x[:, 1:]),
        r"ValueError: shard_lens\[[12]\] must be the number of tokens that this rank passes, 3",
        common=equal_shards,
    ),
    "rows to move": Case(
        shard,
        given(x=torch.zeros(2, TOKENS + 1, 3)),
        "ValueError: x must have 4 rows along dim 1",
        common=equal_shards,
    ),
    "rows": Case(
        VARLEN,
        changed(q=lambda x: x[1:]),
        "ValueError: cu_seqlens_q must end at the tokens of all shards together, [0-9]+, got "
        "[0-9]+; .* shards of different lengths need shard_lens",
    ),
}

DIFFERENT = {
    "batch": Case(RING, narrowed(0, "q", "k", "v"), ("batch, .*", "2", "1")),
    "num_heads": Case(RING, changed(q=lambda x: x[:, :, :2]), ("num_heads, .* of q", "4", "2")),
    "num_kv_heads": Case(RING, narrowed(2, "k", "v"), ("num_kv_heads, .* of k and v", "2", "1")),
    "head_dim": Case(ZIGZAG, narrowed(3, "q", "k"), ("head_dim, .*", "8", "7")),
    "v_head_dim": Case(RING, narrowed(3, "v"), ("v_head_dim, .* of v", "8", "7")),
    "dtype": Case(RING, qkv(lambda x: x.float()), ("dtype", "torch.float64", "torch.float32")),
    "causal": Case(
        RING,
        given(causal=False),
        (
            r"the mask \(causal, window_size or mask\)",
            r"Window\(right=0\)",
            r"Window\(\)",
        ),
    ),
    "window_size": Case(
        ZIGZAG,
        given(window_size=(3, 1)),
        (".*window_size.*", r"Window\(right=0\)", r"Window\(left=3, right=0\)"),
    ),
    "mask": Case(
        RING,
        given(mask="Chunks(3)"),
        (".*causal, window_size or mask.*", r"Window\(right=0\)", r"Chunks\(size=3\)"),
    ),
    "softmax_scale": Case(RING, given(softmax_scale=0.5), ("softmax_scale", "0.35[0-9]*", "0.5")),
    "exchange": Case(RING, given(exchange="ring"), ("exchange", "direct", "ring")),
    "kernel": Case(RING, given(kernel="reference"), ("kernel", "auto", "reference")),
    "deterministic": Case(RING, given(deterministic=True), ("deterministic", "False", "True")),
    "softcap": Case(RING, given(softcap=2.0), ("softcap", "0.0", "2.0")),
    "dropout_p": Case(ZIGZAG, given(dropout_p=0.5), ("dropout_p", "0.0", "0.5")),
    "dropout_seed": Case(
        RING,
        given(dropout_seed=1),
        ("whether dropout_seed is given", "drawn", "given"),
        common=given(dropout_p=0.5),
    ),
    "sinks": Case(
        VARLEN, given(sinks=torch.zeros(4)), ("whether sinks are given", "False", "True")
    ),
    "alibi_slopes": Case(
        RING,
        given(alibi_slopes=torch.zeros(4)),
        ("the shape of alibi_slopes", "None", r"\[4\]"),
    ),
    "bias_gradient": Case(
        RING,
        lambda good: {"bias": whole_bias(good).requires_grad_()},
        ("whether bias requires a gradient", "False", "True"),
        common=lambda good: {"bias": whole_bias(good)},
    ),
    "layout": Case(ZIGZAG, given(layout="zigzag"), ("layout", "contiguous", "zigzag")),
    "tokens": Case(
        RING,
        qkv(lambda x: x[:, 1:]),
        (
            r"shard_lens \(None: every block has as many tokens as the own\)",
            r"\[4(, 4)+\]",
            r"\[3(, 3)+\]",
        ),
    ),
    "shard_lens": Case(
        RING,
        lambda good: {
            **qkv(lambda x: x[:, 1:])(good),
            "shard_lens": [TOKENS] * (len(good["ranks"]) - 1) + [TOKENS - 1],
        },
        ("shard_lens .*", r"\[4(, 4)+\]", r"\[4(, 4)*, 3\]"),
        common=equal_shards,
    ),
    "cu_seqlens": Case(
        VARLEN,
        changed(cu_seqlens_q=lambda x: x[torch.tensor([0, 1, 3, 3])]),
        ("cu_seqlens_q", r"\[0, 1, 1, [0-9]+\]", r"\[0, 1, [0-9]+, [0-9]+\]"),
    ),
    "one document of thousands": Case(
        VARLEN,
        thousands(0),
        ("cu_seqlens_q", "5001 entries with 1 at index 1", "5001 entries with 0 at index 1"),
        common=thousands(1),
    ),
    "op": Case(RING, given(), ("op", "wrap_ring_attn_func", "wrap_zigzag_attn_func"), other=ZIGZAG),
    "way of the rows": Case(shard, given(), ("op", "zigzag_shard", "zigzag_unshard"), unshard),
    "dim": Case(
        shard, given(dim=0), ("dim", "1", "0"), common=given(x=torch.zeros(TOKENS, TOKENS, 3))
    ),
    "other sizes": Case(
        shard,
        given(x=torch.zeros(2, TOKENS, 5)),
        ("the other dimensions of x", r"\[2, 3\]", r"\[2, 5\]"),
    ),
    "block order": Case(
        RING,
        lambda good: {"process_group": good["ranks"][::-1]},
        ("process_group", "{ranks}", "{reversed}"),
    ),
}


def attempts(ranks: list[int], names: list[str]) -> dict[str, Attempt]:
    """The cases on one rank; after each a correct call, with a plan of its own, must succeed."""
    line_up(ranks)
    me, found = ranks.index(dist.get_rank()), {}
    for number, name in enumerate(names):
        case = CASES[name]
        is_last = me == len(ranks) - 1
        op = case.other if is_last and case.other else case.op
        good: dict[str, Any] = {"process_group": ranks}
        if op in (RING, ZIGZAG, VARLEN):
            good |= arguments(op, len(ranks))
        call = good | case.common(good | {"ranks": ranks})
        if is_last:
            call |= case.change(good | {"ranks": ranks})
        found[name] = attempt(lambda: op(**call), ranks)  # noqa: B023
        check_correct_call(ranks, 1.0 + number)
    return found


CASES = {**{f"{name} is refused": x for name, x in REFUSED.items()}, **DIFFERENT}


def check_attempts(ranks: list[int], found: list[dict[str, Attempt]]) -> None:
    """Every rank named what is wrong, and sent nothing, well within 5 s."""
    for name in found[0]:
        ends = [of_rank[name] for of_rank in found]
        for rank, end in zip(ranks, ends, strict=True):
            assert end.sent == 0 and end.seconds < 3.0, (name, rank, end)
        expected = CASES[name].expected
        if isinstance(expected, str):
            check_refusal(ranks, expected, ends)
        else:
            check_difference(ranks, expected, ends)


def check_refusal(ranks: list[int], expected: str, ends: list[Attempt]) -> None:
    *others, own = ends
    error, _, message = expected.partition(": ")
    assert own.error == error and re.search(message, own.message), (expected, own)
    for end in others:
        assert end.error == "RefusedByOtherRankError", (expected, end)
        assert f"rank {ranks[-1]} refused its call of" in end.message, (expected, end)
        assert end.message.endswith(f": {own.error}: {own.message}"), (own, end)


def check_difference(ranks: list[int], expected: tuple[str, str, str], ends: list[Attempt]) -> None:
    argument, good, different = (
        text.replace("{ranks}", re.escape(str(ranks))).replace(
            "{reversed}", re.escape(str(ranks[::-1]))
        )
        for text in expected
    )
    bad = ranks[-1]
    for rank, end in zip(ranks, ends, strict=True):
        mine, theirs, other = good, different, str(bad)
        if rank == bad:
            mine, theirs, other = different, good, "[0-9]"
        assert end.error == "DisagreementError", (expected, end)
        pattern = (
            f"(_func|_shard|_unshard): ranks disagree on {argument}: rank {rank} has {mine}, "
            f"rank {other} has {theirs}; pass the same on all ranks of the group"
        )
        assert re.search(pattern, end.message), (pattern, end.message)
        assert len(end.message) < 300, end.message


@pytest.mark.parametrize("ranks", [[0, 1], [2, 0, 3]], ids=str)
def test_a_wrong_or_different_rank_is_named(pool, ranks):
    check_attempts(ranks, pool.run(None, attempts, list(CASES), ranks=ranks))


def test_a_wrong_or_different_rank_is_named_with_a_tcp_store():
    outcomes = run_fresh(2, attempts, list(CASES), init="tcp")
    assert [outcome.kind for outcome in outcomes] == ["result"] * 2, outcomes
    check_attempts([0, 1], [outcome.value for outcome in outcomes])


# Ranks that come late, never, or with an old plan.


def lonely_plans(ranks: list[int]) -> dict[str, Any]:
    """How each of 3 ranks sees a plan fail; the last case leaves the default group unusable."""
    warm_up()
    me, found = dist.get_rank(), {}
    good = arguments(RING) | {"causal": False}
    patient = dist.new_group(ranks, timeout=timedelta(seconds=60))

    def barrier() -> None:
        dist.barrier(group=patient)

    # Ranks 0 and 1 give up after a second; rank 2 comes when they are gone, and is told the same.
    group = dist.new_group(ranks, timeout=timedelta(seconds=30))
    check_correct_call(group, 0.1)
    set_agreement_timeout(group, 1.0)
    barrier()
    if me == 2:
        time.sleep(2.5)
    found["late"] = attempt(lambda: RING(**good, process_group=group), group)
    set_agreement_timeout(group, 25.0)
    check_correct_call(group, 0.2)

    # An old plan is compared again after that, and no later.
    before = group_state(group_string(group)).agreements
    check_correct_call(group, 0.1)
    check_correct_call(group, 0.1)
    assert group_state(group_string(group)).agreements == before + 1
    barrier()

    # The bound is never longer than the group's timeout; who calls later is told as well.
    brief = dist.new_group(ranks, timeout=timedelta(seconds=2))
    set_agreement_timeout(brief, 100.0)
    if me != 0:
        time.sleep(3.0)
    found["brief"] = attempt(lambda: RING(**good, process_group=brief), brief)
    barrier()

    # Rank 0 refuses, the others repeat an old plan.
    refused = dist.new_group(ranks, timeout=timedelta(seconds=20))
    RING(**good, process_group=refused)
    barrier()
    wrong = {"window_size": (-2, 0)} if me == 0 else {}
    found["refused"] = attempt(lambda: RING(**good, **wrong, process_group=refused), refused)
    barrier()
    found["after"] = attempt(lambda: RING(**good, process_group=refused), refused)
    barrier()

    # Rank 0 has a new plan, the others repeat an old one.
    everyone = dist.group.WORLD
    RING(**good, process_group=everyone)
    barrier()
    new = {"softmax_scale": 0.5} if me == 0 else {}
    found["alone"] = attempt(lambda: RING(**good, **new, process_group=everyone), everyone)
    return found


@pytest.mark.parametrize("init", [pytest.param("file", marks=pytest.mark.full), "tcp"])
def test_ranks_that_come_late_never_or_with_an_old_plan(init):
    outcomes = run_fresh(3, lonely_plans, init=init, timeout_seconds=20.0)
    assert [outcome.kind for outcome in outcomes] == ["result"] * 3, outcomes
    found = [outcome.value for outcome in outcomes]

    for rank, end in enumerate(of_rank["late"] for of_rank in found):
        assert end.error == "DisagreementError" and end.sent == 0, end
        assert re.search(
            r"^wrap_ring_attn_func: rank [01] waited 1 s for rank\(s\) \[2\] to compare a new plan"
            r"\. .*Pass the same arguments on all ranks; .* nnscaler_ring.set_agreement_timeout",
            end.message,
        ), end
        assert 0.9 < end.seconds < 3.0 if rank != 2 else end.seconds < 1.0, end
    assert found[0]["late"].message == found[2]["late"].message, found

    for rank, end in enumerate(of_rank["brief"] for of_rank in found):
        assert "rank 0 waited 2 s for rank(s) [1, 2] to compare" in end.message, (rank, end)
    assert 1.9 < found[0]["brief"].seconds < 4.0, found[0]

    assert found[0]["refused"].error == "ValueError", found[0]
    assert "window_size entries must be" in found[0]["refused"].message
    assert found[0]["refused"].seconds < 1.0, found[0]
    for of_rank in found[1:]:
        end = of_rank["refused"]
        assert end.error == "RefusedByOtherRankError" and end.seconds < 10.0, end
        assert "rank 0 refused its call of wrap_ring_attn_func: ValueError: window" in end.message
        assert "torch.distributed.new_group" in end.message, end
    for of_rank in found:
        end = of_rank["after"]
        assert end.error in ("OutOfStepError", "RefusedByOtherRankError"), end
        assert "rank 0 refused its call of wrap_ring_attn_func" in end.message, end
        assert "cannot be used again: make another one" in end.message, end

    for rank, of_rank in enumerate(found):
        end = of_rank["alone"]
        assert end.error == "DisagreementError" and end.seconds < 10.0, (rank, end)
        assert re.search(
            r"ranks disagree on softmax_scale: rank [0-2] has 0\.[0-9]+, rank [0-2] has 0\.",
            end.message,
        ), end
    assert found[0]["alone"].sent == 0


def test_an_agreement_leaves_nothing_in_the_store(pool):
    assert pool.run(3, keys_left) == [0, 0, 0]


def keys_left(ranks):
    line_up(ranks)
    group = group_string(ranks)
    store = dist.group.WORLD.get_group_store()
    good = arguments(RING) | {"process_group": ranks}
    RING(**good, softmax_scale=3.0)
    dist.barrier(group=group_of(group))
    before, agreements = store.num_keys(), group_state(group).agreements
    dist.barrier(group=group_of(group))
    for number in range(10):
        RING(**good, softmax_scale=4.0 + number)
        RING(**good, softmax_scale=4.0 + number)  # an old plan needs no agreement
    assert group_state(group).agreements == agreements + 10
    dist.barrier(group=group_of(group))
    return store.num_keys() - before


def test_the_plan_not_used_for_longest_is_forgotten():
    state = GroupState()
    for plan in range(PLANS_REMEMBERED):
        state.remember(plan)
    assert state.remembers(0)
    state.remember("one more")
    assert state.remembers(0) and state.remembers("one more")
    assert not state.remembers(1) and state.remembers(2)
