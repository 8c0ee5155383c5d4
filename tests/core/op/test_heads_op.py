"""Heads against rows: what goes where, the way back, and that each is the adjoint of the other."""

import pytest
import torch

from nnscaler_ring.core.op.heads_op import exchange_heads_op, share_text
from nnscaler_ring.core.plan.heads import head_shares
from nnscaler_ring.core.ranks.groups import find_place, group_string
from tests.ranks import RankPool


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ways", "expected"),
    [
        (8, 4, 4, [(0,), (1,), (2,), (3,)]),
        (8, 2, 4, [(0,), (0,), (1,), (1,)]),
        (4, 1, 2, [(0,), (0,)]),
        (12, 3, 4, [(0,), (0, 1, 1), (1, 1, 2), (2,)]),
        (12, 6, 3, [(0, 1), (2, 3), (4, 5)]),
        (6, 2, 1, [(0, 1)]),
    ],
)
def test_shares_keep_every_query_head_with_its_kv_head(
    heads: int, kv_heads: int, ways: int, expected: list[tuple[int, ...]]
) -> None:
    shares = head_shares(heads, kv_heads, ways)
    assert [share.kv for share in shares] == expected
    assert [head for share in shares for head in share.q] == list(range(heads))
    for share in shares:
        for number, head in enumerate(share.q):
            # In a call, query head n reads KV head n // (query heads / KV heads).
            read = share.kv[number * len(share.kv) // len(share.q)]
            assert read == head // (heads // kv_heads)


LENS = {2: [3, 0], 3: [2, 5, 1]}


def there_and_back(ranks: list[int], kv: bool) -> tuple[torch.Tensor, ...]:
    """On one rank: what it gets, what comes home again, and the gradient of a weighted sum."""
    group = group_string(ranks)
    block, lens, ways = find_place(group).block, LENS[len(ranks)], len(ranks)
    shares = [s.kv if kv else s.q for s in head_shares(6, 2, ways)]
    heads = 2 if kv else 6
    x = whole(heads)[:, sum(lens[:block]) : sum(lens[: block + 1])].clone().requires_grad_()
    call = (1, 2, "test", group, share_text(shares), lens)
    moved = exchange_heads_op(x, *call, False, sum(lens), len(shares[block]))
    weights = torch.arange(1.0, moved.numel() + 1, dtype=moved.dtype).view(moved.shape)
    (moved * weights * (block + 1)).sum().backward()
    home = exchange_heads_op(moved.detach(), *call, True, lens[block], heads)
    return moved.detach(), home, x.grad


def whole(heads: int) -> torch.Tensor:
    tokens = 16
    return torch.randn(2, tokens, heads, 3, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kv", [False, True])
def test_rows_of_all_and_back(pool: RankPool, ranks: int, kv: bool) -> None:
    lens, heads = LENS[ranks], 2 if kv else 6
    everything = whole(heads)[:, : sum(lens)]
    shares = [s.kv if kv else s.q for s in head_shares(6, 2, ranks)]
    gradient = torch.zeros_like(everything)
    results = pool.run(ranks, there_and_back, kv)
    for rank, (moved, _, _) in enumerate(results):
        assert torch.equal(moved, everything[:, :, list(shares[rank])])
        weights = torch.arange(1.0, moved.numel() + 1, dtype=moved.dtype).view(moved.shape)
        gradient.index_add_(2, torch.tensor(shares[rank]), weights * (rank + 1))
    copies = torch.zeros(heads, dtype=everything.dtype)
    for share in shares:
        copies.index_add_(0, torch.tensor(share), torch.ones(len(share), dtype=copies.dtype))
    for rank, (_, home, dx) in enumerate(results):
        rows = slice(sum(lens[:rank]), sum(lens[: rank + 1]))
        torch.testing.assert_close(home, everything[:, rows] * copies.view(-1, 1), rtol=0, atol=0)
        torch.testing.assert_close(dx, gradient[:, rows], rtol=0, atol=0)
