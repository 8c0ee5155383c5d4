"""sum_gradients: the gradient of the whole loss on every rank, or a refusal in words on all."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from nnscaler_ring.training import sum_gradients

TOKENS = 7


class Model(nn.Module):
    """An embedding, a weight in its own dtype, a norm in float32, and a weight that is not used."""

    def __init__(self, *, sparse: bool = False, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 4, sparse=sparse, dtype=torch.float64)
        self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.float64).to(dtype))
        self.norm = nn.LayerNorm(4, dtype=torch.float32)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The loss, a sum over tokens."""
        x = self.embedding(ids).to(self.weight.dtype) @ self.weight
        return self.norm(x.to(self.norm.weight.dtype)).double().square().sum() + x.double().sum()


def ids_of_step(step: int) -> torch.Tensor:
    return torch.randint(9, (TOKENS,), generator=torch.Generator().manual_seed(step))


def mine(ranks, ids):
    """Uneven shards; of three ranks the second holds nothing."""
    block = ranks.index(dist.get_rank())
    edges = [0, *([5] * (len(ranks) - 1)), TOKENS]
    return ids[edges[block] : edges[block + 1]]


def gradients(model):
    return {
        name: None if p.grad is None else p.grad.to_dense().clone()
        for name, p in model.named_parameters()
    }


def micro_batches(ranks, options, zero):
    """Two steps of two micro-batches each, the gradients added up once for each step."""
    model, found = Model(**options), []
    for step in (0, 10):
        for micro in (step, step + 1):
            ids = mine(ranks, ids_of_step(micro)) if ranks else ids_of_step(micro)
            if len(ids):
                model(ids).backward()
        sum_gradients(model, ranks, bucket_bytes=100)
        found.append(gradients(model))
        assert model.embedding.weight.grad.is_sparse == options.get("sparse", False)
        model.zero_grad(set_to_none=zero)
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.bfloat16}, {"sparse": True}],
    ids=["dense", "mixed dtypes", "sparse"],
)
@pytest.mark.parametrize("zero", [True, False], ids=["set to None", "zeroed"])
def test_sum_of_micro_batches(pool, options, zero):
    if options.get("sparse") and not zero:
        zero = True  # torch cannot zero a sparse gradient in place everywhere
    whole = micro_batches(None, options, zero)
    for found in pool.run(3, micro_batches, options, zero):
        for mine_, expected in zip(found, whole, strict=True):
            assert mine_["unused"] is None and expected["unused"] is None
            for name in ("embedding.weight", "weight", "norm.weight", "norm.bias"):
                tolerance = 2e-2 if "dtype" in options else 1e-5
                assert expected[name].abs().max() > 0.1, name
                error = (mine_[name].double() - expected[name].double()).norm()
                assert error <= tolerance * expected[name].double().norm(), name


def summed_too_often(ranks):
    """What happens to a program that sums after every micro-batch, and to some that may."""
    told = []
    model = Model()

    def attempt():
        try:
            sum_gradients(model, ranks)
            told.append(None)
        except (RuntimeError, ValueError) as error:
            told.append(str(error))

    def backward():
        model(mine(ranks, ids_of_step(dist.get_rank()))[:1]).backward()

    backward() if dist.get_rank() != 1 else None
    attempt()
    first = gradients(model)
    attempt()  # again, with nothing in between: nothing changes
    second = gradients(model)
    if dist.get_rank() == 0:
        backward()
    attempt()  # the second micro-batch of one rank: refused on all
    model.zero_grad(set_to_none=False)
    model(ids_of_step(5)).backward()
    attempt()
    # A backward pass of something else, as of a generator through a discriminator, then zeroed.
    model(ids_of_step(6)).backward()
    model.zero_grad(set_to_none=True)
    model(ids_of_step(5)).backward()
    attempt()
    twin = copy.deepcopy(model)
    twin(ids_of_step(5)).backward()
    return told, first, second, gradients(model)


def test_what_was_summed_is_not_summed_again(pool):
    for told, first, second, last in pool.run(3, summed_too_often):
        assert told[0] is told[1] is told[3] is told[4] is None
        assert "was summed over the ranks before, and a backward pass has added" in told[2]
        assert "call sum_gradients once for each optimizer step" in told[2]
        for name, gradient in first.items():
            assert gradient is None or torch.equal(gradient, second[name])
        alone = Model()
        alone(ids_of_step(5)).backward()
        torch.testing.assert_close(last["weight"], 3 * alone.weight.grad)


def refusals(ranks):
    """Models that cannot be summed: the same words on every rank."""
    first, told = dist.get_rank() == ranks[0], []

    def attempt(model):
        try:
            sum_gradients(model, ranks)
            told.append(None)
        except (RuntimeError, ValueError) as error:
            told.append(str(error))

    frozen = Model()
    frozen.norm.bias.requires_grad_(not first)
    attempt(frozen)
    attempt(Model(dtype=torch.float32 if first else torch.float64))
    mixed = Model(sparse=first)
    mixed(ids_of_step(0)).backward()
    attempt(mixed)
    attempt(Model().requires_grad_(False))
    attempt(nn.Identity())
    sharded = Model().double()  # FSDP2 wants one dtype
    fully_shard(sharded, mesh=DeviceMesh("cpu", ranks))
    sharded(ids_of_step(0)).backward()
    attempt(sharded)
    return told


def test_refused_in_words_on_every_rank(four_ranks):
    told = four_ranks.run(4, refusals)
    assert told[0] == told[1] == told[3]
    frozen, dtypes, mixed, nothing, empty, sharded = told[0]
    assert "rank 1 has norm.bias: (4,), torch.float32, which rank 0 has not" in frozen
    assert "rank 0 has weight: (4, 4), torch.float32, which rank 1 has not" in dtypes
    assert "'embedding.weight' is dense on 3 rank(s) and sparse on 1" in mixed
    assert nothing is None and empty is None
    assert "is a DTensor over ranks [1, 2, 3] of process_group" in sharded
    assert "leave sum_gradients out" in sharded


def other_dimension(ranks):
    """FSDP2 over two ranks, and the sequence over two pairs of them."""
    mesh = DeviceMesh("cpu", torch.tensor(ranks).view(2, 2), mesh_dim_names=("sequence", "data"))
    model = Model().double()
    fully_shard(model, mesh=mesh["data"]).set_gradient_divide_factor(1.0)
    model.set_force_sum_reduction_for_comms(True)
    model(ids_of_step(dist.get_rank())).backward()
    sum_gradients(model, mesh["sequence"])
    assert isinstance(model.weight.grad, DTensor)
    return {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}


def test_fsdp2_over_another_dimension(four_ranks):
    alone = Model().double()
    for rank in range(4):
        alone(ids_of_step(rank)).backward()
    for found in four_ranks.run(4, other_dimension):
        assert len(found) >= 4
        for name, gradient in found.items():
            if name != "unused":
                expected = alone.get_parameter(name).grad
                torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


def test_arguments():
    sum_gradients(Model(), None)
    with pytest.raises(ValueError, match="bucket_bytes must be at least 1, got 0"):
        sum_gradients(Model(), None, bucket_bytes=0)
