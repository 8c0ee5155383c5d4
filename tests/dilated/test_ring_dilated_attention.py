"""RingDilatedAttention: the op's values on ranks, and every argument honoured or refused."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.distributed as dist

from nnscaler_ring.dilated import BufferLimitError, BufferLimits, RingDilatedAttention
from nnscaler_ring.dilated import ring_dilated_attention as guides_path
from nnscaler_ring.training import recovery
from tests.dilated_oracle import dilated_gradients
from tests.oracle import make_dout, make_qkv
from tests.tolerances import assert_close_float64

BRANCHES = ([4, 9, 24], [1, 2, 3])
LENS = [5, 0, 9]


def attend(ranks, lens, causal, **options):
    """out, dq, dk, dv of this rank's rows of 6 query heads on 2."""
    q, k, v = make_qkv(0, 2, sum(lens), sum(lens), 6, 2, 4)
    block = 0 if ranks is None else ranks.index(dist.get_rank())
    rows = slice(sum(lens[:block]), sum(lens[: block + 1]))
    dout = make_dout(0, q, v)[:, rows]
    q, k, v = (x[:, rows].clone().requires_grad_() for x in (q, k, v))
    module = RingDilatedAttention(*BRANCHES, process_group=ranks, **options)
    out = module(q, k, v, is_causal=causal, shard_lens=lens)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)], module.get_memory_info()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lens", [[14], LENS], ids=str)
def test_equals_the_definition(pool, lens, causal):
    q, k, v = make_qkv(0, 2, 14, 14, 6, 2, 4)
    out, _, *gradients = dilated_gradients(
        q, k, v, make_dout(0, q, v), None, *BRANCHES, causal=causal
    )
    if len(lens) == 1:
        results = [attend(None, lens, causal)]
    else:
        results = pool.run(3, attend, lens, causal, enable_fault_tolerance=True)
    for block, (found, info) in enumerate(results):
        rows = slice(sum(lens[:block]), sum(lens[: block + 1]))
        for name, x, whole in zip(("out", "dq", "dk", "dv"), found, (out, *gradients), strict=True):
            assert_close_float64(x, whole[:, rows], f"{name} of block {block}")
        assert info["ring_size"] == len(lens)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("chunks", [2, 3, 20])
def test_chunks_on_one_device_change_nothing(chunks, causal):
    whole, _ = attend(None, [14], causal)
    cut, info = attend(None, [14], causal, ring_size=chunks)
    for name, x, y in zip(("out", "dq", "dk", "dv"), cut, whole, strict=True):
        assert_close_float64(x, y, name)
    assert info["ring_size"] == chunks


def test_import_path_of_the_guide():
    assert guides_path.RingDilatedAttention is RingDilatedAttention


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, "dropout must be 0.0, got 0.1: the op computes"),
        ({"use_tf32": True}, "use_tf32 must be None, got True: TF32 is a setting"),
        ({"block_size": 1024}, "block_size must be None, got 1024: the exchange"),
        ({"use_checkpointing": False}, "use_checkpointing must be True, got False"),
        ({"ring_size": 0}, "ring_size must be an int of at least 1 or None, got 0"),
        ({"exchange": "pigeon"}, "exchange must be one of"),
        ({"kernel": "abacus"}, "kernel must be 'auto' or one of"),
        ({"head_offsets": "modulo"}, "head_offsets must be one of"),
        ({"cache_size": 0}, "size of a cache must be at least 1"),
        ({"segment_lengths": [4]}, "dilation_rates must have one rate per segment length"),
    ],
)
def test_refused_by_name(options, message):
    arguments = {"segment_lengths": [4, 8], "dilation_rates": [1, 2], **options}
    with pytest.raises((ValueError, NotImplementedError), match=message):
        RingDilatedAttention(**arguments)


def test_ring_size_is_that_of_the_group(pool):
    for message in pool.run(2, _wrong_ring_size):
        assert "ring_size must be the size of process_group, 2, got 3" in message


def _wrong_ring_size(ranks):
    assert RingDilatedAttention([4], [1], ring_size=2, process_group=ranks).ring_size == 2
    with pytest.raises(ValueError) as error:  # noqa: PT011
        RingDilatedAttention([4], [1], ring_size=3, process_group=ranks)
    return str(error.value)


def test_device_and_dtype_are_checked():
    q, k, v = make_qkv(0, 1, 8, 8, 2, 2, 4)
    with pytest.raises(ValueError, match="q must be torch.float32, got torch.float64"):
        RingDilatedAttention([4], [1], dtype=torch.float32)(q, k, v)
    with pytest.raises(ValueError, match="q must be on meta, got cpu"):
        RingDilatedAttention([4], [1], device="meta")(q, k, v)


# Limits.


def test_limits():
    q, k, v = make_qkv(0, 1, 8, 8, 2, 2, 4)
    small = RingDilatedAttention([4], [1], limits=BufferLimits(qkv_elements=191))
    with pytest.raises(BufferLimitError, match=r"Requested QKV buffer \(192 elements\) exceeds"):
        small(q, k, v)
    RingDilatedAttention([4], [1], limits=BufferLimits(qkv_elements=192))(q, k, v)
    assert issubclass(BufferLimitError, RuntimeError)  # some programs catch that
    with pytest.raises(ValueError, match="qkv_elements must be at least 1 or None"):
        BufferLimits(qkv_elements=0)
    with pytest.raises(
        BufferLimitError, match=r"size \(2.1GB\) exceeds maximum reasonable size \(1"
    ):
        BufferLimits().check_communication(2_100_000_000)


def _too_much_to_send(ranks):
    """Only rank 0's limit is too low; all must raise."""
    mine = BufferLimits(communication_bytes=1 if dist.get_rank() == 0 else None)
    module = RingDilatedAttention([16], [1], process_group=ranks, limits=mine)
    q, k, v = make_qkv(0, 1, 8, 8, 2, 2, 4)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        module(q, k, v)
    return str(error.value)


def test_a_limit_of_one_rank_is_told_to_all(pool):
    mine, other = pool.run(2, _too_much_to_send)
    assert "Requested buffer size" in mine
    assert "rank 0 refused its call" in other and "Requested buffer size" in other


# Out of memory.


def _short_of_memory(ranks, failures):
    """Rank 1 cannot have its memory the first `failures` times; what happens on every rank."""
    asked = []

    def allocate(size, device):
        asked.append(size)
        return dist.get_rank() != 1 or len(asked) > failures

    module = RingDilatedAttention([16], [1], process_group=ranks, enable_fault_tolerance=True)
    q, k, v = make_qkv(0, 1, 8, 8, 2, 2, 4)
    real, recovery.try_to_allocate = recovery.try_to_allocate, allocate
    try:
        out = module(q, k, v)
        return len(asked), len(module._needs), out
    except torch.OutOfMemoryError as error:
        return len(asked), 0, str(error)
    finally:
        recovery.try_to_allocate = real


def test_ranks_free_their_caches_and_try_once_more_together(pool):
    for attempts, cached, out in pool.run(2, _short_of_memory, 1):
        assert attempts == 2 and cached == 0 and out.shape == (1, 8, 2, 4)


def test_all_ranks_raise_when_one_has_no_memory(pool):
    for attempts, _, message in pool.run(2, _short_of_memory, 2):
        assert attempts == 2 and "rank(s) [1] cannot have the memory of this call" in message


def test_memory_that_cannot_be_had():
    assert recovery.try_to_allocate(1000, torch.device("cpu"))
    assert not recovery.try_to_allocate(2**62, torch.device("cpu"))


# Caches and figures.


def test_cache_is_bounded_and_shared_by_threads():
    module = RingDilatedAttention([4, 8], [1, 2], cache_size=3)

    def call(tokens):
        q, k, v = make_qkv(0, 1, tokens, tokens, 2, 2, 4)
        return tokens, module(q, k, v)

    expected = dict(map(call, range(1, 9)))
    with ThreadPoolExecutor(4) as threads:
        for tokens, out in threads.map(call, list(range(1, 9)) * 5):
            assert torch.equal(out, expected[tokens])
    assert module.get_memory_info()["qkv_buffers_cached"] == 3
    module.clear_cache()
    assert module.get_memory_info()["qkv_buffers_cached"] == 0


def test_modules_can_be_copied():
    module = RingDilatedAttention([4], [1])
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        q, k, v = make_qkv(0, 1, 5, 5, 2, 2, 4)
        assert torch.equal(other(q, k, v), module(q, k, v))


def test_memory_info_is_measured():
    module = RingDilatedAttention([4], [1])
    assert module.get_memory_info()["max_sequence_length"] is None  # no call yet
    module(*make_qkv(0, 1, 64, 64, 2, 2, 4))
    narrow = module.get_memory_info()
    module(*make_qkv(0, 1, 64, 64, 8, 8, 4))
    wide = module.get_memory_info()
    assert 3.5 < narrow["max_sequence_length"] / wide["max_sequence_length"] < 4.5
    assert wide["free_bytes"] > 2**20 and wide["memory_complexity"] == "O(n / ring_size)"
    gathered = RingDilatedAttention([4], [1], exchange="all_gather").get_memory_info()
    assert gathered["memory_complexity"] == "O(n)"


def test_compiled_module():
    module = RingDilatedAttention([4, 8], [1, 2])
    q, k, v = make_qkv(0, 1, 8, 8, 2, 2, 4)
    torch.compiler.reset()
    compiled = torch.compile(partial(module, is_causal=True), fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v), module(q, k, v, is_causal=True))
