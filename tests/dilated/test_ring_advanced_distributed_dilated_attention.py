"""RingAdvancedDistributedDilatedAttention: meshes of four ranks against one device."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import nnscaler_ring
from nnscaler_ring.dilated import RingAdvancedDistributedDilatedAttention
from nnscaler_ring.dilated import ring_advanced_distributed_dilated_attention as guides_path
from nnscaler_ring.models import even_shard_lens
from nnscaler_ring.training.deepspeed_config import make_deepspeed_config
from tests.tolerances import assert_close_float64

WIDTH, HEADS, KV_HEADS, TOKENS, BATCH = 24, 12, 4, 11, 2
NAMES = ("data", "sequence", "tensor")


def make(mesh, **options):
    """The same weights everywhere; those that start at 0 or 1 are moved."""
    torch.manual_seed(0)
    return RingAdvancedDistributedDilatedAttention(
        WIDTH,
        HEADS,
        [4, 16],
        [1, 3],
        mesh=mesh,
        num_kv_heads=KV_HEADS,
        dtype=torch.float64,
        **options,
    )


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, BATCH, TOKENS, WIDTH, generator=generator, dtype=torch.float64)


def mesh_of(ranks, sizes):
    names = [name for name in NAMES if name in sizes]
    shape = [sizes[name] for name in names]
    return DeviceMesh("cpu", torch.tensor(ranks).view(shape), mesh_dim_names=names)


def my_part(mesh, x):
    """This rank's batch entries and tokens, and the lengths of all shards."""
    names = mesh.mesh_dim_names
    if "data" in names:
        x = x.tensor_split(mesh["data"].size(), 0)[mesh["data"].get_local_rank()]
    if "sequence" not in names:
        return x, None
    lens = even_shard_lens(TOKENS, mesh["sequence"])
    return x.split(lens, 1)[mesh["sequence"].get_local_rank()], lens


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def train(ranks, sizes, options):
    """out of this rank, all gradients in one piece, whole parameters after a step, bytes."""
    mesh = mesh_of(ranks, sizes)
    module = make(mesh, **options)
    (x, lens), (weights, _) = (my_part(mesh, y) for y in inputs())
    x = x.clone().requires_grad_()
    sequence = mesh["sequence"] if "sequence" in sizes else None
    before = nnscaler_ring.traffic(sequence)
    with CommDebugMode() as collectives:
        out, _ = module(x, x, x, is_causal=True, shard_lens=lens)
        (out * weights).sum().div(BATCH * TOKENS).backward()
    sent = nnscaler_ring.traffic(sequence) - before
    pending = module.get_memory_info()["pending_gradient_reductions"]
    if module.zero_stage == 0:
        module.sum_gradients()
    assert module.get_memory_info()["pending_gradient_reductions"] == 0
    gradients = {name: whole(p.grad) for name, p in module.named_parameters()}
    held = module.get_memory_info()["parameter_bytes"]
    counts = collectives.get_comm_counts()
    sums = sum(n for op, n in counts.items() if "all_reduce" in str(op))
    return out.detach(), x.grad, gradients, held, (sums, sent.messages), pending


def one_device():
    module = make(None)
    x, weights = inputs()
    x.requires_grad_()
    out, _ = module(x, x, x, is_causal=True)
    (out * weights).sum().div(BATCH * TOKENS).backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    return out.detach(), x.grad, gradients, size


@pytest.fixture
def four_ranks(pool):
    """A pool whose world is the four ranks: meshes are made by the whole world."""
    if pool.size != 4:
        pool.close()
        pool.size = 4
    return pool


MESHES = [
    ({"data": 2, "sequence": 2}, {}),
    ({"sequence": 2, "tensor": 2}, {"zero_stage": 0, "bucket_size": 0.001}),
    ({"sequence": 2, "tensor": 2}, {"zero_stage": 2, "cpu_offload": True}),
    ({"data": 2, "sequence": 1, "tensor": 2}, {"activation_checkpointing": False}),
    ({"data": 1, "sequence": 4}, {"zero_stage": 0, "layer_norm": True}),
    ({"tensor": 4}, {"bias": True}),
]


@pytest.mark.parametrize(("sizes", "options"), MESHES, ids=str)
def test_mesh_equals_one_device(four_ranks, sizes, options):
    out, dx, gradients, size = one_device()
    results = four_ranks.run(4, train, sizes, options, timeout=120)
    for rank, (found, found_dx, found_gradients, held, _, pending) in enumerate(results):
        coordinate = {}
        rest = rank
        for name in reversed([name for name in NAMES if name in sizes]):
            rest, coordinate[name] = divmod(rest, sizes[name])
        expected, expected_dx = out, dx
        if "data" in sizes:
            rows = [x.tensor_split(sizes["data"], 0)[coordinate["data"]] for x in (out, dx)]
            expected, expected_dx = rows
        if "sequence" in sizes:
            n = sizes["sequence"]
            edges = [block * TOKENS // n for block in range(n + 1)]
            mine = slice(edges[coordinate["sequence"]], edges[coordinate["sequence"] + 1])
            expected, expected_dx = expected[:, mine], expected_dx[:, mine]
        assert_close_float64(found, expected, f"out of rank {rank}")
        assert_close_float64(found_dx, expected_dx, f"dx of rank {rank}")
        assert set(found_gradients) == set(gradients)
        for name, gradient in gradients.items():
            assert gradient.abs().max() > 1e-4, f"{name}: nothing to compare"
            assert_close_float64(found_gradients[name], gradient, f"{name} on rank {rank}")
        zero = options.get("zero_stage", 3 if set(sizes) != {"tensor"} else 0)
        shared = 4 if zero else sizes.get("tensor", 1)
        assert held <= 1.3 * size / shared
        assert pending == (len(gradients) if zero == 0 and set(sizes) != {"tensor"} else 0)


def test_checkpointing_repeats_no_communication(four_ranks):
    sizes = {"sequence": 2, "tensor": 2}
    plain, checkpointed = (
        [
            result[4]
            for result in four_ranks.run(
                4, train, sizes, {"zero_stage": 0, "activation_checkpointing": flag}
            )
        ]
        for flag in (False, True)
    )
    assert plain == checkpointed
    for sums, messages in plain:
        assert sums > 3 and messages > 0


def refusals(ranks):
    """What meshes that do not fit are told."""
    mesh = mesh_of(ranks, {"sequence": 2, "tensor": 2})
    messages = []
    for options in (
        {"data_parallel": True},
        {"model_parallel": False},
        {"communication_backend": "nccl"},
        {"ring_size": 4},
        {"mesh": DeviceMesh("cpu", torch.tensor(ranks).view(2, 2), mesh_dim_names=["a", "b"])},
        {"num_heads": 3, "num_kv_heads": 3},
        {"zero_stage": 0, "cpu_offload": True},
        {"zero_stage": 0, "use_gradient_compression": True},
        {"zero_stage": 3, "bucket_size": 25},
        {"zero_stage": 3, "overlap_communication": False},
    ):
        arguments = {"embed_dim": WIDTH, "num_heads": HEADS, "mesh": mesh, **options}
        try:
            RingAdvancedDistributedDilatedAttention(
                **arguments, segment_lengths=[4], dilation_rates=[1]
            )
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_what_does_not_fit_the_mesh(four_ranks):
    wanted = [
        "data_parallel must be False or None for a mesh with dimensions ('sequence', 'tensor')",
        "model_parallel must be True or None",
        "communication_backend must be what the mesh communicates with, gloo, or None",
        "ring_size must be the size of process_group, 2, got 4",
        "mesh must have dimensions named out of ('data', 'sequence', 'tensor'), got ('a', 'b')",
        "num_kv_heads must be a multiple of the mesh's tensor dimension, 2, got 3",
        "cpu_offload must be False with zero_stage=0",
        "use_gradient_compression must be False with zero_stage=0",
        "bucket_size must be None with zero_stage=3",
        "overlap_communication must be None or True with zero_stage=3",
    ]
    for messages in four_ranks.run(4, refusals):
        for message, start in zip(messages, wanted, strict=True):
            assert message.startswith(start)


def test_compressed_gradients(four_ranks):
    """Summed in bfloat16: near, and not equal."""
    _, _, gradients, _ = one_device()
    for result in four_ranks.run(
        4, train, {"data": 2, "sequence": 2}, {"use_gradient_compression": True}
    ):
        found = result[2]
        error = max(((found[name] - g).norm() / g.norm()).item() for name, g in gradients.items())
        assert 1e-5 < error < 2e-2


def test_import_path_of_the_guide():
    name = "RingAdvancedDistributedDilatedAttention"
    assert getattr(guides_path, name) is RingAdvancedDistributedDilatedAttention


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_8bit_optimizer": True}, "use_8bit_optimizer must be False, got True: a layer owns"),
        ({"nvme_offload": True}, "nvme_offload needs use_deepspeed=True and a folder nvme_path"),
        ({"zero_stage": 3}, "zero_stage must be 0 or None without ranks to shard over"),
        ({"zero_stage": 1}, "stage 1 shards optimizer states"),
        ({"sequence_parallel": True}, "sequence_parallel must be False or None"),
        ({"log_level": "LOUD"}, "log_level must be one of"),
        ({"checkpoint_interval": 0}, "checkpoint_interval must be at least 1"),
        ({"bucket_size": 0}, "bucket_size must be above 0 megabytes"),
        ({"profile_memory": True, "enable_monitoring": False}, "profile_memory must be False"),
    ],
)
def test_refused_by_name(options, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        RingAdvancedDistributedDilatedAttention(WIDTH, HEADS, [4], [1], **options)


def test_sum_gradients_needs_stage_0(four_ranks):
    for message in four_ranks.run(4, _sum_twice):
        assert "sum_gradients is for zero_stage=0, this layer has zero_stage=3" in message


def _sum_twice(ranks):
    module = make(mesh_of(ranks, {"sequence": 4}))
    with pytest.raises(RuntimeError) as error:
        module.sum_gradients()
    return str(error.value)


# DeepSpeed.


def test_deepspeed_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ImportError, match="pip install deepspeed"):
        RingAdvancedDistributedDilatedAttention(WIDTH, HEADS, [4], [1], use_deepspeed=True)


def test_deepspeed_config_of_the_layer(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace())
    module = RingAdvancedDistributedDilatedAttention(
        WIDTH,
        HEADS,
        [4],
        [1],
        use_deepspeed=True,
        cpu_offload=True,
        use_gradient_compression=True,
        nvme_offload=True,
        nvme_path="/nvme",
        bucket_size=50,
        overlap_communication=False,
    )
    config = module.deepspeed_config
    zero = config["zero_optimization"]
    assert zero["stage"] == 3 and zero["reduce_bucket_size"] == 25_000_000
    assert zero["offload_param"] == {"device": "nvme", "nvme_path": "/nvme"}
    assert zero["overlap_comm"] is False and config["communication_data_type"] == "bf16"
    assert make(None).deepspeed_config is None


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_deepspeed_accepts_the_config(zero_stage):
    config_class = pytest.importorskip("deepspeed.runtime.config").DeepSpeedConfig
    config = make_deepspeed_config(
        embed_dim=64, zero_stage=zero_stage, cpu_offload=True, compress_gradients=True
    )
    accepted = config_class(config)
    assert accepted.zero_config.stage == zero_stage
    assert accepted.communication_data_type == torch.bfloat16


# Monitoring and cleaning up.


def test_forward_passes_are_logged(caplog):
    module = make(None, log_level="WARNING")
    with caplog.at_level(logging.WARNING):
        module(inputs()[0])
        module(inputs()[0])
    assert "'forward_passes': 2" in caplog.text and "forward_seconds" in caplog.text
    caplog.clear()
    make(None, enable_monitoring=False)(inputs()[0])
    assert not caplog.text


def test_wandb_is_told_where_a_run_is_under_way(monkeypatch):
    told = []
    wandb = SimpleNamespace(run=None, log=told.append)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    module = make(None)
    module(inputs()[0])
    assert not told
    wandb.run = "a run"
    module(inputs()[0])
    assert told[0]["dilated_attention/forward_passes"] == 2


def test_cleanup():
    module = make(None)
    module(inputs()[0])[0].sum().backward()
    module.cleanup()
    assert module.get_memory_info()["qkv_buffers_cached"] == 0
    assert all(p.grad is None for p in module.parameters())
    module(inputs()[0])
