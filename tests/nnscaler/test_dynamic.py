"""Plans at other lengths, batches and documents than they were traced with: right, or refused."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.nnscaler_trainer.model import LanguageModel, Pages
from nnscaler_ring import policies
from tests.nnscaler.models import OneCall
from tests.nnscaler.runtime import nnscaler_ranks, parallelize
from tests.oracle import dense_attention, make_dout, make_qkv
from tests.ranks import RankPool
from tests.tolerances import assert_close_float64

TRACED = (2, 24)  # batch rows and tokens
CHANGED = [(2, 24), (2, 32), (3, 8), (1, 2)]
BOUNDS = ([0, 5, 12, 24], [0, 1, 2, 24], [0, 24, 24, 24], [0, 24], [0, 3, 6, 9, 12, 15, 24])


def inputs_of(batch: int | None, tokens: int) -> dict[str, Tensor]:
    q, k, v = make_qkv(tokens, batch, tokens, tokens, 4, 2, 4)
    return {"q": q, "k": k, "v": v}


def step(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """out, dq, dk, dv."""
    leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v")]
    out = model(**inputs)
    dout = make_dout(0, inputs["q"], inputs["v"])
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def other_shapes(ranks: list[int], op: str, shapes: list[tuple[int, int]]) -> list[Any]:
    """Results of each shape, or the error that it ends in."""
    found: list[Any] = []
    with nnscaler_ranks() as nnscaler:
        model, _ = parallelize(
            nnscaler, OneCall(op, {}), inputs_of(*TRACED), policies.shard_sequence, len(ranks)
        )
        for shape in shapes:
            try:
                found.append(step(model, inputs_of(*shape)))
            except ValueError as error:
                found.append(str(error))
    return found


@pytest.mark.parametrize("op", ["ring", "zigzag"])
def test_other_lengths_and_uneven_batches(two_ranks: RankPool, op: str) -> None:
    for results in two_ranks.run(2, other_shapes, op, CHANGED, timeout=60):
        for shape, found in zip(CHANGED, results, strict=True):
            check(found, inputs_of(*shape), None)


@pytest.mark.full
def test_tokens_that_do_not_divide() -> None:
    """nnScaler hands out 13 and 12 of 25 tokens; the op tells the ranks of it."""
    pool = RankPool(start_size=2, max_size=2)
    try:
        for (refusal,) in pool.run(2, other_shapes, "ring", [(2, 25)], timeout=60):
            assert "[13, 13]" in refusal and "[12, 12]" in refusal, refusal
    finally:
        pool.close()


def other_samples(ranks: list[int]) -> list[float]:
    """Losses of a language model whose samples are longer, shorter, more and fewer."""
    torch.manual_seed(0)
    with nnscaler_ranks() as nnscaler:
        model, _ = parallelize(
            nnscaler,
            LanguageModel(*SAMPLES[0], width=16),
            {"sample": sample_of(*SAMPLES[0])},
            policies.shard_sequence,
            len(ranks),
            use_end2end=True,
        )
        return [model.train_step([sample_of(*shape)])[0].item() for shape in SAMPLES]


SAMPLES = [(32, 2), (48, 2), (16, 2), (32, 1), (32, 3)]  # tokens, rows


def sample_of(tokens: int, rows: int) -> dict[str, Tensor]:
    pages = Pages(tokens, ["heapq.py"])
    return {key: torch.stack([pages[row][key] for row in range(rows)]) for key in pages[0]}


def test_other_samples(two_ranks: RankPool) -> None:
    """Views that leave the tokens to torch, as our models' do, are not fixed."""
    torch.manual_seed(0)
    model = LanguageModel(*SAMPLES[0], width=16)
    expected = [model(sample_of(*shape)).item() for shape in SAMPLES]
    for losses in two_ranks.run(2, other_samples, timeout=60):
        assert losses == pytest.approx(expected, rel=1e-5)


def check(found: list[Tensor], inputs: dict[str, Tensor], bounds: list[int] | None) -> None:
    q, k, v = (inputs[name].requires_grad_() for name in ("q", "k", "v"))
    out, _ = dense_attention(q, k, v, causal=True, cu_seqlens_q=bounds)
    expected = [out, *torch.autograd.grad(out, (q, k, v), make_dout(0, q, v))]
    for x, y in zip(found, expected, strict=True):
        assert_close_float64(x, y, str(tuple(q.shape)))


def other_documents(ranks: list[int]) -> list[list[Tensor]]:
    """Every step has other documents; each is validated first, on the same cu_seqlens."""
    policy = partial(policies.shard_sequence, dim=0)
    inputs = inputs_of(None, TRACED[1])
    bounds = [torch.tensor(x, dtype=torch.int32) for x in BOUNDS]
    found = []
    with nnscaler_ranks() as nnscaler:
        dummy = {**inputs, "cu_q": bounds[0], "cu_k": bounds[0]}
        model, _ = parallelize(
            nnscaler, OneCall("varlen", {"causal": True}), dummy, policy, len(ranks)
        )
        for x in bounds:
            with torch.inference_mode():
                validated = model(**inputs, cu_q=x, cu_k=x)
            found.append(step(model, {**inputs, "cu_q": x, "cu_k": x}))
            assert torch.equal(validated, found[-1][0])
    return found


def test_other_documents_every_step(two_ranks: RankPool) -> None:
    """Also another number of them, and validated under inference_mode before they are trained."""
    for results in two_ranks.run(2, other_documents, timeout=60):
        for bounds, found in zip(BOUNDS, results, strict=True):
            check(found, inputs_of(None, TRACED[1]), bounds)
