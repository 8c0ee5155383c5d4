"""The demonstration's model knows nothing of where its tokens are."""

import torch
import torch.nn.functional as F

from nnscaler_ring.demo.model import Decoder, ModelConfig, rope_rotation, rotate

TINY = ModelConfig(width=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, hidden=16)


def causal_by_position(positions):
    """Dense attention to the tokens that stand earlier, in whatever order they are held."""

    def attention(q, k, v):
        mask = positions.unsqueeze(1) >= positions
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(
            0, 1
        )

    return attention


def test_tokens_may_be_held_in_any_order():
    torch.manual_seed(0)
    model = Decoder(TINY).double()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    inputs, positions, order = torch.randint(256, (12,)), torch.arange(12), torch.randperm(12)
    logits = model(inputs, positions, causal_by_position(positions))
    shuffled = model(inputs[order], positions[order], causal_by_position(positions[order]))
    torch.testing.assert_close(shuffled, logits[order], rtol=0, atol=1e-11)
    local = model(inputs[order], positions, causal_by_position(positions[order]))
    assert (local - logits[order]).abs().max() > 1e-3  # RoPE matters


def test_rope_scores_depend_on_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, TINY.head_dim, dtype=torch.float64)

    def score(i, j):
        turns = rope_rotation(torch.tensor([i, j]), TINY, torch.float64)
        return (rotate(q, turns[:, :1]) * rotate(k, turns[:, 1:])).sum()

    torch.testing.assert_close(score(7, 3), score(100_007, 100_003), rtol=0, atol=1e-9)
    assert (score(7, 3) - score(7, 4)).abs() > 1e-3
