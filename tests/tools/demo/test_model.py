"""The demonstration's model knows nothing of where its tokens are."""

import pytest
import torch
import torch.nn.functional as F

from nnscaler_ring.tools.demo.model import Decoder, ModelConfig

TINY = ModelConfig(width=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, hidden=16)


def causal_by_position(positions):
    """Dense attention to the tokens that stand earlier, in whatever order they are held."""

    def attention(q, k, v, cu_seqlens):
        mask = positions.unsqueeze(1) >= positions
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2)

    return attention


def model_for(positions):
    torch.manual_seed(0)
    model = Decoder(TINY, causal_by_position(positions)).double()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return model


def test_tokens_may_be_held_in_any_order():
    torch.manual_seed(1)
    inputs, positions = torch.randint(256, (2, 12)), torch.arange(12)
    order = torch.randperm(12)
    logits = model_for(positions).logits(inputs, positions.expand(2, 12))
    model = model_for(positions[order])
    shuffled = model.logits(inputs[:, order], positions[order].expand(2, 12))
    torch.testing.assert_close(shuffled, logits[:, order], rtol=0, atol=1e-11)
    local = model.logits(inputs[:, order], positions.expand(2, 12))
    assert (local - logits[:, order]).abs().max() > 1e-3  # RoPE matters


def test_the_loss_is_summed_over_all_tokens():
    inputs, targets = torch.randint(256, (2, 2, 12)).unbind(0)
    positions = torch.arange(12)
    model = model_for(positions)
    logits = model.logits(inputs, positions.expand(2, 12))
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    loss = model(inputs, positions.expand(2, 12), targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
