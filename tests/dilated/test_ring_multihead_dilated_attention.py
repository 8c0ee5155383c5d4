"""RingMultiheadDilatedAttention: ranks against one device against the definition."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import nnscaler_ring
from nnscaler_ring.dilated import BufferLimitError, BufferLimits, RingMultiheadDilatedAttention
from nnscaler_ring.dilated import ring_multihead_dilated_attention as guides_path
from tests.dilated_oracle import dilated_attention
from tests.models.sharded import assert_ranks_equal_one_device, contiguous_rows, make
from tests.tolerances import assert_close_float64

BRANCHES = ([4, 9], [1, 2])
WIDTH, HEADS, KV_HEADS = 24, 6, 2


class Layer(nn.Module):
    """Of one input, with a result that is a tensor."""

    def __init__(self, process_group=None, causal=True, **options):
        super().__init__()
        self.causal = causal
        self.attention = RingMultiheadDilatedAttention(
            WIDTH, HEADS, *BRANCHES, num_kv_heads=KV_HEADS, process_group=process_group, **options
        )

    def forward(self, x, shard_lens=None):
        out, weights = self.attention(x, x, x, is_causal=self.causal, shard_lens=shard_lens)
        assert weights is None
        return out


def inputs(tokens):
    generator = torch.Generator().manual_seed(0)
    x, dout = torch.randn(2, 2, tokens, WIDTH, generator=generator, dtype=torch.float64)
    return x, dout


@pytest.mark.parametrize(
    ("lens", "options"),
    [
        ([7, 0, 6], {}),
        ([5, 6], {"causal": False, "bias": False, "use_checkpointing": False}),
        ([5, 5], {"layer_norm": False, "head_offsets": "block", "exchange": "ring"}),
    ],
    ids=str,
)
def test_ranks_equal_one_device(pool, lens, options):
    build = partial(Layer, **options)
    assert_ranks_equal_one_device(pool, build, *inputs(sum(lens)), contiguous_rows(lens))


def definition(module, query, key, value, causal):
    """The layer from its weights, one head after another."""
    weight = module.qkv_weight.view(KV_HEADS, HEADS // KV_HEADS + 2, -1, WIDTH)
    bias = module.qkv_bias.view(KV_HEADS, HEADS // KV_HEADS + 2, -1)

    def project(x, first, stop):
        w, b = weight[:, first:stop].flatten(0, 1), bias[:, first:stop].flatten(0, 1)
        return torch.einsum("btc,hdc->bthd", x, w) + b

    q, k, v = project(query, 0, 3), project(key, 3, 4), project(value, 4, 5)
    out = dilated_attention(q, k, v, *BRANCHES, causal=causal)[0].flatten(2)
    mean = out.mean(-1, keepdim=True)
    variance = (out - mean).square().mean(-1, keepdim=True)
    out = (out - mean) / (variance + 1e-5).sqrt() * module.norm.weight + module.norm.bias
    return out @ module.out_weight.T + module.out_bias


@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_definition(causal):
    module = make(Layer, None).attention
    x, y = inputs(13)
    for query, key, value in ((x, x, x), (x, y, y), (x, y, x + y)):
        out, _ = module(query, key, value, is_causal=causal)
        assert_close_float64(out, definition(module, query, key, value, causal), "out")


def test_called_with_the_query_alone():
    module = make(Layer, None).attention
    x, _ = inputs(5)
    assert torch.equal(module(x)[0], module(x, x, x, None, False, None, True, False)[0])


def test_import_path_of_the_guide():
    assert guides_path.RingMultiheadDilatedAttention is RingMultiheadDilatedAttention


def test_magneto_initialisation():
    torch.manual_seed(0)
    module = RingMultiheadDilatedAttention(96, 6, [4], [1], gamma_init=0.5, num_kv_heads=3)
    weight = module.qkv_weight.view(3, 4, 16, 96)

    def deviation(fan_out, gain):
        return gain * (2 / (96 + fan_out)) ** 0.5

    for part, expected in (
        (weight[:, :2], deviation(96, 1.0)),
        (weight[:, 2], deviation(48, 1.0)),
        (weight[:, 3], deviation(48, 0.5)),
        (module.out_weight, deviation(96, 0.5)),
    ):
        assert part.std().item() == pytest.approx(expected, rel=0.05)
    assert not module.qkv_bias.any() and not module.out_bias.any()
    assert module.norm.weight.eq(1).all() and not module.norm.bias.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"need_weights": True}, "need_weights must be False, got True: the probabilities"),
        ({"key_padding_mask": torch.zeros(2, 5)}, "key_padding_mask must be None, got a tensor"),
        ({"attn_mask": torch.zeros(5, 5)}, "attn_mask must be None, got a tensor"),
        ({"average_attn_weights": False}, "average_attn_weights must be True, got False"),
        ({"key": torch.zeros(2, 6, WIDTH)}, "key must have query's tokens"),
        ({"value": torch.zeros(2, 5, 3)}, r"value must be \[batch, tokens, embed_dim=24\]"),
    ],
)
def test_calls_refused_by_name(call, message):
    module = RingMultiheadDilatedAttention(WIDTH, HEADS, *BRANCHES)
    x = torch.zeros(2, 5, WIDTH)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        module(x, **{"key": x, "value": x, **call})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads must divide embed_dim, 24, got 5"),
        ({"num_kv_heads": 4}, "num_kv_heads must divide num_heads, 6, got 4"),
        ({"dropout": 0.1}, "dropout must be 0.0"),
        ({"block_size": 512}, "block_size must be None"),
        ({"use_tf32": False}, "use_tf32 must be None"),
        ({"use_flash_attention": True, "kernel": "reference"}, "use_flash_attention must be None"),
    ],
)
def test_arguments_refused_by_name(options, message):
    arguments = {"embed_dim": WIDTH, "num_heads": HEADS, **options}
    with pytest.raises((ValueError, NotImplementedError), match=message):
        RingMultiheadDilatedAttention(**arguments, segment_lengths=[4], dilation_rates=[1])


def test_kernel_of_use_flash_attention():
    kernels = {
        flag: RingMultiheadDilatedAttention(
            WIDTH, HEADS, *BRANCHES, use_flash_attention=flag
        ).attention.kernel
        for flag in (None, True, False)
    }
    assert kernels == {None: "auto", True: "auto", False: "reference"}


def test_qkv_limit_is_checked_before_the_projection():
    limits = BufferLimits(qkv_elements=2 * 5 * WIDTH * 3 - 1)
    module = RingMultiheadDilatedAttention(WIDTH, HEADS, *BRANCHES, limits=limits)
    with pytest.raises(BufferLimitError, match="Requested QKV buffer"):
        module(torch.zeros(2, 5, WIDTH))


def messages(ranks, use_checkpointing):
    """Messages of a training step, and the gradients."""
    module = make(partial(Layer, use_checkpointing=use_checkpointing), ranks)
    x, _ = inputs(10)
    before = nnscaler_ring.traffic(ranks)
    module(x[:, :5] if dist.get_rank() == ranks[0] else x[:, 5:]).square().sum().backward()
    sent = nnscaler_ring.traffic(ranks) - before
    return sent.messages, sent.total_bytes, [p.grad for p in module.parameters()]


def test_checkpointing_repeats_no_message(pool):
    for (count, size, plain), (again, resent, saved) in zip(
        pool.run(2, messages, False), pool.run(2, messages, True), strict=True
    ):
        assert (count, size) == (again, resent) and count > 0
        assert all(torch.equal(x, y) for x, y in zip(plain, saved, strict=True))


def test_checkpointing_keeps_less():
    """Of what autograd keeps, projections and norm inputs go."""
    kept = {}
    for flag in (False, True):
        module = RingMultiheadDilatedAttention(WIDTH, HEADS, *BRANCHES, use_checkpointing=flag)
        sizes = {}

        def pack(x, sizes=sizes):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        x = torch.randn(2, 64, WIDTH, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out, _ = module(x)
        kept[flag] = sum(sizes.values())
        del out
    assert kept[True] < 0.7 * kept[False]


def test_compiled_layer(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    x, _ = inputs(6)
    plain = make(Layer, None)
    compiled = make(partial(Layer, compile_model=True, use_checkpointing=False), None)
    assert_close_float64(compiled(x), plain(x), "out")


def test_autocast():
    module = RingMultiheadDilatedAttention(WIDTH, HEADS, *BRANCHES)
    x = torch.randn(2, 8, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = module(x)
    assert out.dtype == torch.bfloat16
    assert F.mse_loss(out.float(), module(x)[0]) < 1e-3
