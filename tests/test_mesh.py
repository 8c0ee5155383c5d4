"""Attention on a mesh of sequence and heads: every option, mask, layout and exchange, exact."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from nnscaler_ring import (
    packed_positions,
    packed_rows,
    packed_shard_lens,
    traffic,
    wrap_dilated_attn_func,
    wrap_ring_attn_func,
    wrap_ring_attn_varlen_func,
    wrap_zigzag_attn_func,
    zigzag_positions,
)
from tests.contract import Contract, compare, covering, run_contract
from tests.oracle import dense_gradients, make_dout, make_qkv
from tests.ranks import RankPool
from tests.tolerances import assert_close_float64

MESHES = ((1, 4), (2, 2), (4, 1))
HEADS = {1: ((6, 2), (4, 1)), 2: ((6, 2), (2, 2), (4, 1), (6, 3)), 4: ((4, 1), (8, 2), (12, 3))}


def contracts_for(ways: int) -> list[Contract]:
    """Of the contract's calls those over four ranks, with heads that `ways` ranks can share."""
    found = [
        contract
        for contract in covering(2, seed=4)
        if len(contract.ranks) == 4 and contract.case.op != "zigzag in zigzag order"
    ]
    return [
        replace(contract, case=replace(contract.case, heads=HEADS[ways][n % len(HEADS[ways])]))
        for n, contract in enumerate(found)
    ]


def on_mesh(
    ranks: list[int], shape: tuple[int, int], contracts: list[Contract]
) -> list[dict[str, Tensor]]:
    """On one rank: what it gets for every contract."""
    mesh: Any = init_device_mesh("cpu", shape, mesh_dim_names=("sequence", "heads"))
    return [run_contract(contract, torch.distributed.get_rank(), mesh) for contract in contracts]


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_options_masks_layouts_and_exchanges(four_ranks: RankPool, shape: tuple[int, int]) -> None:
    contracts = contracts_for(shape[1])
    assert {contract.case.op for contract in contracts} == {"ring", "zigzag", "varlen"}
    shards = four_ranks.run(4, on_mesh, shape, contracts, timeout=300)
    for number, contract in enumerate(contracts):
        compare(contract, [shard[number] for shard in shards])


BOUNDS = (0, 5, 5, 29, 30, 53)
NAMES = ("out", "dq", "dk", "dv")


def inputs(packed: bool) -> tuple[Tensor, ...]:
    total = BOUNDS[-1]
    q, k, v = make_qkv(9, None if packed else 1, total, total, 4, 2, 4)
    return q, k, v, make_dout(9, q, v)


def in_balanced_order(ranks: list[int], shape: tuple[int, int], packed: bool) -> list[Tensor]:
    """On one rank: its rows, zigzag or folded, and what it gets for them."""
    mesh: Any = init_device_mesh("cpu", shape)
    total = BOUNDS[-1]
    rows = packed_rows(BOUNDS, mesh) if packed else zigzag_positions(total, mesh)
    q, k, v, dout = (x.index_select(-3, rows) for x in inputs(packed))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    lens: list[Any] = [None] * len(ranks)
    torch.distributed.all_gather_object(lens, len(rows))
    options: Any = {"causal": True, "process_group": mesh, "shard_lens": lens}
    if packed:
        assert lens == packed_shard_lens(BOUNDS, mesh)
        assert torch.equal(packed_positions(BOUNDS, mesh), packed_positions(BOUNDS, None)[rows])
        cu_seqlens = torch.tensor(BOUNDS)
        out = wrap_ring_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, layout="folded", **options
        )
    else:
        out = wrap_zigzag_attn_func(q, k, v, layout="zigzag", **options)
    return [rows, *(x.detach() for x in (out, *torch.autograd.grad(out, (q, k, v), dout)))]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_held_in_balanced_order(four_ranks: RankPool, shape: tuple[int, int], packed: bool) -> None:
    bounds = torch.tensor(BOUNDS) if packed else None
    out, _, *gradients = dense_gradients(
        *inputs(packed), causal=True, window_size=(-1, -1), cu_seqlens_q=bounds, cu_seqlens_k=bounds
    )
    shards = four_ranks.run(4, in_balanced_order, shape, packed)
    assert torch.cat([shard[0] for shard in shards]).sort().values.equal(torch.arange(BOUNDS[-1]))
    for block, (rows, *found) in enumerate(shards):
        for name, actual, dense in zip(NAMES, found, (out, *gradients), strict=True):
            wanted = dense.index_select(-3, rows)
            assert_close_float64(actual, wanted, f"{name} of block {block}")


def errors(ranks: list[int]) -> list[str]:
    """On one rank of a 2 x 2 mesh: what each mistake raises."""
    mesh: Any = init_device_mesh("cpu", (2, 2))
    q, three = torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 3, 4)
    seed = torch.distributed.get_rank()
    found = []
    for call in (
        lambda: wrap_ring_attn_func(three, three, three, process_group=mesh),
        lambda: wrap_ring_attn_func(q, q, q, process_group=mesh, dropout_p=0.5, dropout_seed=seed),
        lambda: wrap_ring_attn_func(q, q, q, process_group=mesh, shard_lens=[3, 3, 3]),
        lambda: wrap_dilated_attn_func(q, q, q, [4], [1], process_group=mesh),
        lambda: wrap_ring_attn_func(q, q, q, process_group=mesh, kernel="transformer_engine"),
    ):
        try:
            call()
            found.append("")
        except ValueError as error:
            found.append(str(error))
    return found


def test_mistakes_are_named(four_ranks: RankPool) -> None:
    for found in four_ranks.run(4, errors):
        for text, wanted in zip(
            found,
            (
                "2 ranks that share the heads, divides the query heads, got num_heads=3",
                "dropout_seed must be the same on all ranks",
                "shard_lens must have one length for each of the 4 ranks",
                "process_group as a DeviceMesh must have one dimension here",
                "kernel='transformer_engine' takes no mesh",
            ),
            strict=True,
        ):
            assert wanted in text


def bytes_sent(ranks: list[int], tokens: int, heads: tuple[int, int]) -> tuple[int, int]:
    """On one rank: bytes of a causal forward pass with all ranks in a row, and in a ring."""
    counted = []
    for group in (init_device_mesh("cpu", (1, len(ranks))), ranks):
        q, k = (torch.zeros(1, tokens, n, 4) for n in heads)
        before = traffic(group)
        wrap_ring_attn_func(q, k, k, process_group=group, exchange="ring")
        counted.append((traffic(group) - before).total_bytes)
    return counted[0], counted[1]


def test_heads_move_fewer_bytes_than_a_ring(four_ranks: RankPool) -> None:
    """Per rank (N-1)/N of q, k, v and the result; in a ring N-1 shards of k and v."""
    tokens, head_bytes, ranks = 6, 4 * 4, 4
    for row, ring in four_ranks.run(ranks, bytes_sent, tokens, (8, 8)):
        assert ring == (ranks - 1) * tokens * 2 * 8 * head_bytes
        assert row == (ranks - 1) * tokens * 4 * 2 * head_bytes
        assert row == ring // 2


def compiled(ranks: list[int]) -> float:
    """On one rank: how far the gradients of the compiled call are from those of the eager one."""
    mesh: Any = init_device_mesh("cpu", (2, 2))
    q, k, v = (x.requires_grad_() for x in make_qkv(ranks.index(0), 1, 6, 6, 4, 2, 4))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return wrap_zigzag_attn_func(q * 1.0, k, v, process_group=mesh).sum()

    wanted = torch.autograd.grad(attend(q, k, v), (q, k, v))
    found = torch.autograd.grad(
        torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v), (q, k, v)
    )
    return max((a - b).abs().max().item() for a, b in zip(wanted, found, strict=True))


def test_compiles_as_one_graph(four_ranks: RankPool) -> None:
    assert four_ranks.run(4, compiled, timeout=240) == [0.0] * 4
