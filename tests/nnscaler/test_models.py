"""The ready models under nnScaler: the same losses, gradients and weights as on one device."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnscaler_ring import policies
from nnscaler_ring.models import (
    EnergyTransformerBlock,
    RingAttention,
    RingAttentionModel,
    Transformer,
    TransformerConfig,
)
from tests.nnscaler.runtime import nnscaler_ranks, parallelize
from tests.ranks import RankPool

TOKENS, WIDTH, VOCABULARY = 12, 8, 11
IN_CHUNKS = pytest.param("edifice in 4 chunks", marks=pytest.mark.full)
NAMES = ("contiguous", "zigzag", "attention", "block", "edifice", IN_CHUNKS)
# eps far above rounding: a key's bias has no gradient, since softmax does not see what is added to
# all scores of a query, and Adam would turn the rounding that is left of it into a step. How much
# is left differs from processor to processor.
ADAMW = partial(torch.optim.AdamW, lr=0.01, eps=1e-3)


class LanguageLoss(nn.Module):
    """The sum over tokens of the loss of a `Transformer`."""

    def __init__(self, balanced: bool) -> None:
        super().__init__()
        sizes = {"width": WIDTH, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
        config = TransformerConfig(VOCABULARY, **sizes, head_dim=4, hidden=10, balanced=balanced)
        self.model = Transformer(config)

    def forward(self, ids: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
        log_probabilities = nn.functional.log_softmax(self.model(ids, positions), dim=-1)
        losses = nn.functional.nll_loss(log_probabilities.transpose(1, 2), labels, reduction="none")
        return losses.sum()


class VectorLoss(nn.Module):
    """The sum of a weighted result of a model of vectors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return (self.model(x) * weights).sum()


def make_edifice(num_chunks: int = 1) -> RingAttentionModel:
    return RingAttentionModel.build(
        embed_dim=6,
        hidden_size=WIDTH,
        num_heads=2,
        num_layers=2,
        num_chunks=num_chunks,
        dropout=0.0,
        window_size=TOKENS,
    )


def make(name: str) -> nn.Module:
    torch.manual_seed(1)
    if name in ("contiguous", "zigzag"):
        return LanguageLoss(name == "zigzag").double()
    models: dict[str, Any] = {
        "attention": partial(RingAttention, WIDTH, 2),
        "block": partial(EnergyTransformerBlock, WIDTH, 2, 10, dropout_rate=0.0),
        "edifice": make_edifice,
        "edifice in 4 chunks": partial(make_edifice, 4),
    }
    return VectorLoss(models[name]()).double()


def batch_of(name: str, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    randn = partial(torch.randn, generator=generator, dtype=torch.float64)
    if name in ("contiguous", "zigzag"):
        ids = torch.randint(VOCABULARY, (2, TOKENS + 1), generator=generator)
        positions = torch.arange(TOKENS).unsqueeze(0)
        return {
            "ids": ids[:, :-1].contiguous(),
            "positions": positions,
            "labels": ids[:, 1:].contiguous(),
        }
    edifice = name.startswith("edifice")
    x = randn(2, TOKENS, 6 if edifice else WIDTH)
    return {"x": x, "weights": randn(2, WIDTH) if edifice else randn(2, TOKENS, WIDTH)}


def train(ranks: list[int] | None, name: str) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and final weights; on one device for ranks=None."""
    if ranks is None:
        model = make(name)
        return _steps(model, ADAMW(model.parameters()), name), model.state_dict()
    with nnscaler_ranks() as nnscaler:
        model, _ = parallelize(
            nnscaler, make(name), batch_of(name, 0), policies.shard_sequence, len(ranks)
        )
        losses = _steps(model, nnscaler.build_optimizer(model, ADAMW), name)
        states: list[Any] = [None] * len(ranks)
        torch.distributed.all_gather_object(states, model.state_dict())
        weights, _ = nnscaler.merge_state_dicts(states, None)
    return losses, weights


def _steps(model: Any, optimizer: torch.optim.Optimizer, name: str) -> list[float]:
    losses = []
    for step in range(3):
        loss = model(*batch_of(name, step).values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", NAMES)
def test_trains_like_one_device(two_ranks: RankPool, name: str) -> None:
    expected_losses, expected = train(None, name)
    for losses, weights in two_ranks.run(2, train, name, timeout=120):
        assert losses == pytest.approx(expected_losses, rel=1e-9)
        assert set(weights) == set(expected)
        for parameter, x in weights.items():
            torch.testing.assert_close(
                x,
                expected[parameter],
                rtol=0,
                atol=1e-9,
                msg=lambda text, p=parameter: f"{p}: {text}",
            )
