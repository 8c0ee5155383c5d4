"""Every model under torch.autocast: it runs, computes attention in bfloat16, and stays near."""

import contextlib

import pytest
import torch

from nnscaler_ring.dilated import RingMultiheadDilatedAttention, RingTransformer
from nnscaler_ring.models import (
    EnergyTransformerBlock,
    RingAttention,
    RingAttentionModel,
    Transformer,
    TransformerConfig,
)
from nnscaler_ring.training import sum_gradients

TOKENS = 10


def build(name, group):
    torch.manual_seed(0)
    match name:
        case "RingAttention":
            return RingAttention(16, 4, process_group=group)
        case "RingAttention in chunks":
            return RingAttention(16, 4, ring_size=None if group else 3, process_group=group)
        case "EnergyTransformerBlock":
            return EnergyTransformerBlock(16, 4, 32, dropout_rate=0.0, process_group=group)
        case "RingAttentionModel":
            return RingAttentionModel.build(
                embed_dim=16,
                hidden_size=16,
                num_layers=2,
                dropout=0.0,
                window_size=TOKENS,
                process_group=group,
            )
        case "Transformer":
            config = TransformerConfig(
                11, 16, 2, num_heads=4, num_kv_heads=2, head_dim=8, hidden=32
            )
            return Transformer(config, process_group=group)
        case "RingMultiheadDilatedAttention":
            return RingMultiheadDilatedAttention(16, 4, [4, 16], [1, 2], process_group=group)
        case "RingTransformer":
            return RingTransformer(
                11,
                16,
                4,
                1,
                TOKENS,
                segment_lengths=[4, 16],
                dilation_rates=[1, 2],
                process_group=group,
            )
    raise ValueError(name)


MODELS = (
    "RingAttention",
    "RingAttention in chunks",
    "EnergyTransformerBlock",
    "RingAttentionModel",
    "Transformer",
    "RingMultiheadDilatedAttention",
    "RingTransformer",
)


def train(ranks, name, autocast):
    """(loss of this rank, gradients over all ranks, dtypes of attention's queries)."""
    model = build(name, ranks)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, TOKENS, 16, generator=generator)
    if name in ("Transformer", "RingTransformer"):
        x = torch.randint(11, (1, TOKENS), generator=generator)
    if ranks is not None:
        block = ranks.index(torch.distributed.get_rank())
        x = x[:, block * TOKENS // len(ranks) : (block + 1) * TOKENS // len(ranks)]
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with context:
        out = model(x)
        out = out[0] if isinstance(out, tuple) else out
        loss = out.float().square().sum() / TOKENS
    loss.backward()
    sum_gradients(model, ranks)
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_near(found, expected):
    assert found.keys() == expected.keys() and len(found) > 2
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        scale = max(expected[name].norm(), max(g.norm() for g in expected.values()) / 50)
        assert (gradient - expected[name]).norm() <= 0.08 * scale, name


@pytest.mark.parametrize("name", MODELS)
def test_autocast_on_one_device(name):
    exact, gradients = train(None, name, False)
    loss, found = train(None, name, True)
    assert abs(loss - exact) <= 0.05 * abs(exact)
    # The loss after a layer norm may be the same, whatever comes before it.
    assert any(not torch.equal(gradient, gradients[name]) for name, gradient in found.items())
    assert_near(found, gradients)


def train_all(ranks):
    return [train(ranks, name, True) for name in MODELS]


def test_autocast_on_ranks(pool):
    expected = [train(None, name, False)[1] for name in MODELS]
    for results in pool.run(2, train_all):
        for name, (_, found), whole in zip(MODELS, results, expected, strict=True):
            if name == "RingAttentionModel":  # every rank's loss is of the same last timestep
                found = {key: gradient / 2 for key, gradient in found.items()}
            assert_near(found, whole)


def test_attention_is_in_bfloat16(monkeypatch):
    seen = []
    real = torch.ops.nnscaler_ring.attention.default

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op is real:
                seen.append([x.dtype for x in args if isinstance(x, torch.Tensor)][:3])
            return op(*args, **(kwargs or {}))

    with Watch():
        for name in ("RingAttention", "Transformer", "EnergyTransformerBlock"):
            train(None, name, True)
    assert len(seen) >= 4 and {dtype for call in seen for dtype in call} == {torch.bfloat16}
