"""Rows between layouts: every token arrives where the target layout wants it, and no other."""

import itertools
import random

import pytest
import torch

import nnscaler_ring
from nnscaler_ring.core.plan.layout import LAYOUTS, ZigzagDocuments
from nnscaler_ring.core.plan.moves import plan_moves
from nnscaler_ring.core.ranks.groups import Traffic, find_place, group_state, group_string
from nnscaler_ring.core.ranks.relayout import move_rows
from nnscaler_ring.core.ranks.transport import Transport
from tests.core.plan.test_layout import random_lens, tokens_of_layout

WAYS = [way for way in itertools.product(LAYOUTS, LAYOUTS) if way[0] != way[1]]


def leavers(source: str, target: str, lens: list[int], rank: int) -> int:
    """How many tokens of a rank are another's in the target layout."""
    before, after = tokens_of_layout(source, lens)[rank], tokens_of_layout(target, lens)[rank]
    return len(set(before) - set(after))


@pytest.mark.parametrize(("source", "target"), WAYS)
def test_every_token_arrives_where_the_target_has_it(source, target):
    rng = random.Random(1)
    for _ in range(400):
        lens = random_lens(rng, longest=rng.choice((2, 9)))
        layouts = LAYOUTS[source].for_shards(lens), LAYOUTS[target].for_shards(lens)
        before = [torch.tensor(x) for x in tokens_of_layout(source, lens)]
        moves = [plan_moves(*layouts, rank) for rank in range(len(lens))]
        # One queue per pair of ranks: messages of a pair arrive in the order they were sent in.
        queues = {
            pair: [
                before[pair[0]][run.rows] for run in moves[pair[0]].sends if run.block == pair[1]
            ]
            for pair in itertools.permutations(range(len(lens)), 2)
        }
        for rank, mine in enumerate(moves):
            after = torch.full((mine.new_length,), -1)
            for old, new in mine.kept:
                after[new] = before[rank][old]
            for run in mine.receives:
                message = queues[run.block, rank].pop(0)
                assert message.numel() == after[run.rows].numel() > 0, (lens, rank, run)
                after[run.rows] = message
            assert after.tolist() == tokens_of_layout(target, lens)[rank], (lens, rank)
            assert mine.sent_rows() == leavers(source, target, lens, rank), (lens, rank)
        assert not any(queues.values()), (lens, queues)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_contiguous_to_zigzag_takes_two_messages_to_a_rank_at_most(ranks):
    layouts = (
        LAYOUTS["contiguous"].for_shards([8] * ranks),
        LAYOUTS["zigzag"].for_shards([8] * ranks),
    )
    for rank in range(ranks):
        assert len(plan_moves(*layouts, rank).sends) <= 2
        assert len(plan_moves(*layouts, rank).receives) <= 2


def move_cases(ranks, cases):
    """On one rank: x after each move, and the bytes that the move sent."""
    group = group_string(ranks)
    place = find_place(group)
    results = []
    for number, (source, target, lens, dim, dtype, strided) in enumerate(cases):
        layouts = LAYOUTS[source].for_shards(lens), LAYOUTS[target].for_shards(lens)
        x = whole(sum(lens), dim, dtype).index_select(
            dim, torch.tensor(tokens_of_layout(source, lens)[place.block], dtype=torch.int64)
        )
        if strided:
            x = x.transpose(0, -1).contiguous().transpose(0, -1)
        before = nnscaler_ring.traffic(ranks)
        transport = Transport(place, group_state(group).traffic, "test", number)
        (moved,) = move_rows([(x, dim)], plan_moves(*layouts, place.block), transport)
        sent = nnscaler_ring.traffic(ranks) - before
        results.append((moved, moved.is_contiguous(), sent.relayout_bytes, sent.total_bytes))
    return results


def whole(total: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """The tensor of all tokens, the same on every rank."""
    shape = [2, 3, 2]
    shape[dim] = total
    numbers = torch.arange(torch.Size(shape).numel())
    return numbers.remainder(3 if dtype == torch.bool else 101).reshape(shape).to(dtype)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_moves_between_ranks(pool, ranks):
    rng = random.Random(ranks)
    cases = []
    for source, target in WAYS:
        for dim in range(3):
            for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
                lens = [rng.randint(0, 7) for _ in range(ranks)]
                cases.append((source, target, lens, dim, dtype, rng.random() < 0.5))
    shards = pool.run(ranks, move_cases, cases)
    for number, (source, target, lens, dim, dtype, _) in enumerate(cases):
        everything = whole(sum(lens), dim, dtype)
        for rank in range(ranks):
            moved, contiguous, relayout_bytes, total_bytes = shards[rank][number]
            tokens = torch.tensor(tokens_of_layout(target, lens)[rank], dtype=torch.int64)
            assert torch.equal(moved, everything.index_select(dim, tokens)), cases[number]
            assert contiguous and moved.dtype == dtype
            row = everything.nbytes // max(1, sum(lens))
            assert relayout_bytes == total_bytes == leavers(source, target, lens, rank) * row


def move_documents(ranks, cu_seqlens):
    """On one rank: two tensors in zigzag order of every document, and back; messages sent."""
    group = group_string(ranks)
    place = find_place(group)
    held = LAYOUTS["contiguous"].for_shards([cu_seqlens[-1] // len(ranks)] * len(ranks))
    documents = ZigzagDocuments(cu_seqlens, len(ranks))
    start = place.block * held.shard_lens[0]
    mine = torch.arange(start, start + held.shard_lens[place.block])
    tensors = [(mine.float().view(1, -1, 1), 1), (mine.view(-1, 1).repeat(1, 3), 0)]
    transport = Transport(place, Traffic(), "test", 1)
    there = move_rows(tensors, plan_moves(held, documents, place.block), transport)
    back = move_rows(
        [(there[0], 1), (there[1], 0)], plan_moves(documents, held, place.block), transport
    )
    spans = documents.spans(place.block)
    wanted = torch.cat([torch.arange(s.position, s.position + s.length) for s in spans])
    found = [there[0].flatten().long(), there[1][:, 2]]
    return (
        [x.tolist() == wanted.tolist() for x in found],
        [torch.equal(x, y) for x, (y, _) in zip(back, tensors, strict=True)],
        transport.traffic.messages,
    )


def test_rows_of_many_documents_are_one_message_to_a_rank(pool):
    """NCCL may hang in a post of a thousand messages."""
    cu_seqlens = tuple(8 * n for n in range(46))
    for there, back, messages in pool.run(4, move_documents, cu_seqlens):
        assert all(there) and all(back)
        assert messages <= 2 * 2 * 3 * 2  # there and back, two tensors, three ranks, two runs
