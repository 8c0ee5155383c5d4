"""The two loops, with all ranks in one process: an exchange that just hands out the shards."""

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from nnscaler_ring.core.engine import attention_backward, attention_forward
from nnscaler_ring.core.exchange import GradientStep, Keys
from nnscaler_ring.core.kernels import BackwardTensors
from nnscaler_ring.core.kernels.reference import Reference
from nnscaler_ring.core.kernels.torch_cpu import TorchCpu
from nnscaler_ring.core.plan.tile import Tile
from nnscaler_ring.core.scores.scores import Scores
from nnscaler_ring.core.sums.online_softmax import accumulation_dtype
from nnscaler_ring.core.sums.row_sum import RowSum
from tests.core.kernels.test_reference import one_thread  # noqa: F401
from tests.core.plan.test_schedule import Problem, dense_problem, random_problems
from tests.core.test_exchange import dense_results, engine_inputs
from tests.tolerances import assert_close_float64

SCALE = 0.4


class InOneProcess:
    """A KVExchange for one rank of many that live in the same process."""

    def __init__(self, problem: Problem, rank: int, ks: list[Tensor], vs: list[Tensor]) -> None:
        self.tiles = [problem.schedule.tiles(rank, (source,)) for source in problem.ranks]
        self.rows = [((source, 0, k.shape[1]),) for source, k in enumerate(ks)]
        self.ks, self.vs = ks, vs
        self.sums = [(RowSum(k), RowSum(v)) for k, v in zip(ks, vs, strict=True)]

    def steps(self, k: Tensor, v: Tensor) -> Iterator[Keys]:
        for keys in zip(self.ks, self.vs, self.tiles, self.rows, strict=True):
            yield Keys(*keys)

    def gradient_steps(self, k: Tensor, v: Tensor) -> Iterator[GradientStep]:
        steps = zip(self.ks, self.vs, self.tiles, self.rows, self.sums, strict=True)
        for *keys, sums in steps:
            yield GradientStep(*keys, *sums)

    def gradients(self) -> tuple[Tensor, Tensor]:
        return self.sums[0][0].current(), self.sums[0][1].current()


def shards_of(tokens: list[list[int]], x: Tensor, dim: int = 1) -> list[Tensor]:
    index = (torch.tensor(t, dtype=torch.int64, device=x.device) for t in tokens)
    return [x.index_select(dim, rows) for rows in index]


def run(problem: Problem, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, kernel) -> list[list]:
    """Per rank out, lse, dq; the sums of dk and dv of every rank's rows over all ranks.

    As over the direct exchange: gradients travel in the dtype of the input, and are summed wider.
    """
    qs, douts = (shards_of(problem.q_tokens, x) for x in (q, dout))
    ks, vs = (shards_of(problem.k_tokens, x) for x in (k, v))
    wide = accumulation_dtype(q.dtype)
    dks, dvs = ([torch.zeros_like(x, dtype=wide) for x in shards] for shards in (ks, vs))
    outs, lses, dqs = [], [], []
    for rank in problem.ranks:
        options = {"kernel": kernel, "scores": Scores(SCALE)}
        exchange = InOneProcess(problem, rank, ks, vs)
        mine = qs[rank], ks[rank], vs[rank]
        out, lse = attention_forward(*mine, exchange=exchange, **options)
        dq, *_ = attention_backward(
            BackwardTensors(douts[rank], None, *mine, out, lse), exchange=exchange, **options
        )
        for source, (dk, dv) in enumerate(exchange.sums):
            dks[source] += dk.current().to(q.dtype)
            dvs[source] += dv.current().to(q.dtype)
        outs.append(out)
        lses.append(lse)
        dqs.append(dq)
    return [outs, lses, dqs, dks, dvs]


def check(problem: Problem, seed: int, batch: int, kernel) -> None:
    q, k, v, dout = engine_inputs(seed, problem, batch)
    expected = dense_results(problem, q, k, v, dout)
    found = run(problem, q, k, v, dout, kernel)
    for n, name in enumerate(("out", "lse", "dq", "dk", "dv")):
        tokens = problem.k_tokens if n > 2 else problem.q_tokens
        for rank, wanted in enumerate(shards_of(tokens, expected[n], 2 if name == "lse" else 1)):
            assert_close_float64(found[n][rank], wanted, f"{name} of {rank}: {problem.what}")


@pytest.mark.parametrize("kernel", [Reference(), TorchCpu()], ids=lambda k: k.name)
def test_any_layout_mask_and_packing_equals_dense(kernel):
    for seed, problem in enumerate(random_problems(21, 100)):
        check(problem, seed, 1 + seed % 2, kernel)


class LocalNormaliser(Reference):
    """What a tile's backward must not do: take the out and lse of the tile alone."""

    def backward(self, tensors, scores):
        out, lse = self.forward(tensors.q, tensors.k, tensors.v, scores)
        return super().backward(tensors._replace(out=out, softmax_lse=lse), scores)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_gradients_of_tiles_need_the_global_lse(layout):
    """Right with the merged out and lse; wrong with the tile's own, so the test above can tell."""
    problem = dense_problem(layout, layout, (8, 8, 8), True, (-1, -1))
    check(problem, 0, 1, Reference())
    with pytest.raises(AssertionError, match="dq of"):
        check(problem, 0, 1, LocalNormaliser())


class Spy(Reference):
    """Keeps what every backward call was given."""

    def __init__(self) -> None:
        self.given: list[tuple[Tensor, Tensor, Tensor]] = []

    def backward(self, tensors, scores):
        self.given.append((tensors.q, tensors.out, tensors.softmax_lse))
        return super().backward(tensors, scores)


def test_every_tile_is_given_the_merged_out_and_lse_of_its_rows():
    problem = dense_problem("zigzag", "contiguous", (8, 8, 8), True, (-1, -1))
    q, k, v, dout = engine_inputs(3, problem, 2)
    kernel = Spy()
    outs, lses, *_ = run(problem, q, k, v, dout, kernel)
    calls = iter(kernel.given)
    for rank in problem.ranks:
        for source in problem.ranks:
            for tile in problem.schedule.tiles(rank, (source,)):
                _, out, lse = next(calls)
                assert torch.equal(out, outs[rank][:, tile.q])
                assert torch.equal(lse, lses[rank][..., tile.q])
    assert next(calls, None) is None


@pytest.mark.parametrize("kernel", [Reference(), TorchCpu()], ids=lambda k: k.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [(-1, -1), (4, 0)], ids=str)
def test_results_are_contiguous_in_the_dtype_of_the_inputs(kernel, dtype, window):
    """One block or many, adopted or merged, heads before rows in memory or not."""
    for lens in ((20,), (9, 0, 11), (0, 0)):
        problem = dense_problem("contiguous", "contiguous", lens, True, window)
        tensors = [x.to(dtype) for x in engine_inputs(1, problem, 2)]
        for strided in (False, True):
            if strided:
                tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
            outs, lses, dqs, *_ = run(problem, *tensors, kernel)
            for rank, (out, lse, dq) in enumerate(zip(outs, lses, dqs, strict=True)):
                n = lens[rank]
                assert out.shape == (2, n, 4, 3) and dq.shape == (2, n, 4, 5)
                assert lse.shape == (2, 4, n)
                assert out.dtype == dq.dtype == dtype
                assert lse.dtype == (dtype if dtype == torch.float64 else torch.float32)
                assert all(x.is_contiguous() for x in (out, lse, dq))


def test_a_rank_without_rows_calls_no_kernel():
    class Refuses(Reference):
        def forward(self, *args, **options):
            raise AssertionError("an empty tile went to the kernel")

        backward = forward

    problem = dense_problem("contiguous", "contiguous", (0, 0), False, (-1, -1))
    for x in run(problem, *engine_inputs(0, problem, 2), Refuses()):
        assert all(shard.numel() == 0 for shard in x)


def test_inputs_are_left_as_they_are():
    """Results are adopted and added to in place; what the caller passed is not theirs."""
    rng = random.Random(1)
    for problem in random_problems(22, 10):
        tensors = engine_inputs(rng.randint(0, 9), problem, 1)
        copies = [x.clone() for x in tensors]
        run(problem, *tensors, TorchCpu())
        assert all(torch.equal(x, y) for x, y in zip(tensors, copies, strict=True))


def test_positions_are_copied_to_the_device_for_what_depends_on_them():
    """A softcap does not; a copy from the host would make every step wait."""
    problem = dense_problem("contiguous", "contiguous", (8,), True, (-1, -1))
    slopes = torch.ones(1, 2)
    for mods, place in (({"softcap": 2.0}, "cpu"), ({"alibi_slopes": slopes}, "meta")):
        scores = Scores(SCALE, problem.schedule, 0, **mods)
        step = scores.of_keys(((0, 0, 8),), torch.device("meta"))
        mods_of_tile = step.of(Tile(0, 4, 0, 4)).mods
        assert mods_of_tile is not None
        for x in (*mods_of_tile.q, *mods_of_tile.k):
            assert x.device.type == place
