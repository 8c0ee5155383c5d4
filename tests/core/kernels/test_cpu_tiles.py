"""The package's C++ kernel against dense float64, for every instruction set that this machine has.

Where it is not compiled these tests are skipped; test_library.py next door needs no compiler.
"""

import itertools
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nnscaler_ring.core.kernels import cpu_tiles
from nnscaler_ring.core.kernels.contract import BackwardTensors
from nnscaler_ring.core.kernels.cpu_tiles import DTYPES, PreparedCpuTiles
from nnscaler_ring.core.kernels.native.build import INSTRUCTION_SETS
from nnscaler_ring.core.kernels.native.library import library
from nnscaler_ring.core.kernels.reference import Reference
from nnscaler_ring.core.kernels.torch_cpu import TorchCpu
from nnscaler_ring.core.scores.coordinates import Coordinates
from nnscaler_ring.core.scores.dropout import Dropout
from nnscaler_ring.core.scores.scores import ScoreMods, Scores, TileScores
from tests.contract import compare, covering, run_contract
from tests.core.kernels.test_reference import (
    HEAD_DIMS,
    HEADS,
    SCALE,
    OneDevice,
    Shape,
    attention_backward,
    attention_forward,
    check_large_logits,
    check_tile,
    inputs,
    one_thread,  # noqa: F401
    random_shapes,
    scheduled_shapes,
    tile_of,
)
from tests.core.kernels.test_torch_cpu import STRIDES
from tests.tolerances import RATIO_TO_ONE_DEVICE, relative_l2

REFERENCE = Reference()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read before it is written is NaN, not the 0 of fresh memory."""
    monkeypatch.setattr(cpu_tiles, "POISONED", True)


def kernel_of(instruction_set: str | None = None) -> PreparedCpuTiles:
    found = library(instruction_set)
    if isinstance(found, str):
        pytest.skip(f"cpu_tiles for {instruction_set or 'this machine'}: {found}")
    return PreparedCpuTiles(found)


@pytest.fixture(params=INSTRUCTION_SETS)
def kernel(request: pytest.FixtureRequest) -> PreparedCpuTiles:
    """For an instruction set that this machine may have better ones than."""
    return kernel_of(request.param)


@pytest.fixture
def best() -> PreparedCpuTiles:
    return kernel_of()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", HEAD_DIMS)
@pytest.mark.parametrize("heads", HEADS)
def test_random_tiles_equal_dense(kernel, heads, dims, dtype):
    for shape in random_shapes(2, 12, size=12):
        check_tile(kernel, shape, *(x.to(dtype) for x in inputs(shape, heads, dims)))


def test_tiles_of_schedules_equal_dense(kernel):
    for shape in scheduled_shapes(3, 12):
        check_tile(kernel, shape, *(x.float() for x in inputs(shape)), may_cancel=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(64, 64), (80, 48), (33, 129), (1, 1)], ids=str)
def test_sizes_around_a_block_equal_dense(kernel, dims, dtype):
    """Blocks have 64 queries and 64 keys, and 4 times 64 queries share what is read of the keys."""
    for rows, keys, window in (
        (63, 65, (-1, 0)),
        (64, 64, (-1, 0)),
        (129, 127, (-1, -1)),
        (260, 300, (40, 100)),
        (300, 260, (70, 60)),
    ):
        shape = Shape(rows, keys, window)
        check_tile(kernel, shape, *(x.to(dtype) for x in inputs(shape, (2, 1), dims, batch=1)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_that_differ_by_ten_thousand(kernel, dtype):
    check_large_logits(kernel, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_is_that_of_the_fused_kernel_at_most(kernel, dtype):
    shape = Shape(1080, 1080, (-1, 0))
    q, k, v, dout = inputs(shape, (2, 1), (32, 32), batch=1)
    errors = {}
    exact = results(REFERENCE, shape, *(x.to(dtype).double() for x in (q, k, v, dout)))
    for other in (kernel, TorchCpu()):
        found = results(other, shape, *(x.to(dtype) for x in (q, k, v, dout)))
        errors[other.name] = [
            relative_l2(actual, wanted) for actual, wanted in zip(found, exact, strict=True)
        ]
    for name, ours, theirs in zip(("out", "lse", "dq", "dk", "dv"), *errors.values(), strict=True):
        assert ours <= RATIO_TO_ONE_DEVICE.limit * theirs, (name, dtype, ours, theirs)


def results(kernel, shape: Shape, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    """out, lse, dq, dk, dv of one tile."""
    options = {
        "exchange": OneDevice(tile_of(shape)),
        "kernel": kernel,
        "scores": Scores(q.shape[-1] ** -0.5),
    }
    out, lse = attention_forward(q, k, v, **options)
    tensors = BackwardTensors(dout, None, q, k, v, out, lse)
    return [out, lse, *attention_backward(tensors, **options)[:3]]


# Options.


def one_device_contracts(seed: int):
    """Contracts whose shards one device holds, in float32 where they say float64."""
    for contract in covering(2, seed=seed):
        case = contract.case
        if case.op == "zigzag in zigzag order":
            continue
        whole = {name: (sum(getattr(case, name)),) for name in ("shard_lens", "shard_lens_k")}
        case = replace(case, world_size=1, kernel="cpu_tiles", exchange="direct", **whole)
        dtype = torch.float32 if contract.dtype == torch.float64 else contract.dtype
        yield replace(contract, case=case, ranks=(0,), dtype=dtype)


def test_pairs_of_options_equal_dense(kernel, monkeypatch):
    monkeypatch.setattr("nnscaler_ring.core.kernels.cpu_tiles.CpuTiles.prepared", lambda *_: kernel)
    for contract in one_device_contracts(seed=1):
        compare(contract, [run_contract(contract, 0, None)])


def mods_of(nq: int, nk: int, heads: int, dtype: torch.dtype) -> dict[str, ScoreMods]:
    """Score options one by one and together, at positions that are not 0, 1, 2 and so on."""
    generator = torch.Generator().manual_seed(3)
    q_places, k_places = 5 + 3 * torch.arange(nq), 2**26 + 7 - 2 * torch.arange(nk)
    none = ScoreMods(
        softcap=0.0,
        alibi_slopes=None,
        bias=None,
        needs_dbias=False,
        dropout=None,
        q=Coordinates(q_places, q_places + 2**26),
        k=Coordinates(k_places, k_places),
    )
    bias = torch.randn(2, 1, nk, nq, generator=generator).to(dtype).transpose(2, 3)
    values = {
        "softcap": {"softcap": 1.5},
        "alibi": {"alibi_slopes": torch.rand(2, heads, generator=generator) * 0.1},
        "bias": {"bias": bias, "needs_dbias": True},
        "dropout": {"dropout": Dropout(0.3, torch.tensor(-(2**61)), 4, 7)},
    }
    values["all"] = {name: value for one in values.values() for name, value in one.items()}
    return {name: replace(none, **fields) for name, fields in values.items()}


@pytest.mark.parametrize("option", ["softcap", "alibi", "bias", "dropout", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_options_in_several_blocks_equal_the_definition(kernel, dtype, option):
    nq, nk, heads = 150, 131, 4
    shape = Shape(nq, nk, (100, 30))
    q, k, v, dout = (x.to(dtype) for x in inputs(shape, (heads, 2), (20, 12)))
    mods = mods_of(nq, nk, heads, dtype)[option]
    scores = TileScores(SCALE, shape.window, mods)
    wide = [x.double() for x in (q, k, v)]
    out, lse = REFERENCE.forward(*wide, scores)
    dlse = torch.randn(lse.shape, generator=torch.Generator().manual_seed(4))
    tensors = BackwardTensors(dout.double(), dlse, *wide, out, lse)
    expected = out, lse, *REFERENCE.backward(tensors, scores)
    found_out, found_lse = kernel.forward(q, k, v, scores)
    tensors = BackwardTensors(dout, dlse, q, k, v, out.to(dtype), lse.float())
    grads = kernel.backward(tensors, scores)
    limit = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}[dtype]
    for name, actual, wanted in zip(
        ("out", "lse", "dq", "dk", "dv", "dbias"),
        (found_out, found_lse, *grads),
        expected,
        strict=True,
    ):
        assert (actual is None) == (wanted is None), name
        if wanted is not None:
            error = relative_l2(actual, wanted)
            assert error <= limit, f"{name} of {option} in {dtype}: {error:.2e}"


def test_a_dropped_probability_is_the_definitions(best):
    """Bit by bit: with values of one key each, out shows which pairs are kept."""
    nq, nk = 70, 130
    mods = mods_of(nq, nk, 2, torch.float32)["dropout"]
    q, k = torch.zeros(2, nq, 2, 4), torch.zeros(2, nk, 2, 4)
    v = torch.eye(nk).expand(2, 2, nk, nk).transpose(1, 2)
    out, _ = best.forward(q, k, v, TileScores(1.0, (-1, -1), mods))
    kept = mods.dropout_factors(2, 2, torch.float32) > 0
    assert torch.equal(out.transpose(1, 2) > 0, kept)


# What is not a usual number.


def both_passes(kernel, scores, q, k, v, dout):
    """out, lse, dq, dk, dv, dbias."""
    out, lse = kernel.forward(q, k, v, scores)
    return out, lse, *kernel.backward(BackwardTensors(dout, None, q, k, v, out, lse), scores)


def compare_with_definition(kernel, q, k, v, dout, window, softmax_scale=SCALE, mods=None):
    """In float32 against the definition in float64, element by element."""
    scores = TileScores(softmax_scale, window, mods)
    expected, found = (
        both_passes(either, scores, *tensors)
        for either, tensors in (
            (REFERENCE, [x.double() for x in (q, k, v, dout)]),
            (kernel, [q, k, v, dout]),
        )
    )
    for name, actual, wanted in zip(
        ("out", "lse", "dq", "dk", "dv", "dbias"), found, expected, strict=True
    ):
        if wanted is None:
            assert actual is None, name
            continue
        size = max(1.0, wanted[wanted.isfinite()].abs().max().item())
        torch.testing.assert_close(
            actual.double(), wanted, rtol=0, atol=4e-6 * size, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("scale", [-0.5, 0.0, -3.0, 1e-3])
def test_scales_of_any_sign(kernel, scale):
    shape = Shape(70, 80, (-1, 0))
    tensors = [x.float() for x in inputs(shape, (2, 1), (12, 12))]
    compare_with_definition(kernel, *tensors, shape.window, softmax_scale=scale)
    mods = mods_of(70, 80, 2, torch.float32)["softcap"]
    compare_with_definition(kernel, *tensors, shape.window, softmax_scale=scale, mods=mods)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_spoils_what_it_enters_and_nothing_else(kernel, dtype):
    for name, index in itertools.product("qk", (0, 65)):
        shape = Shape(70, 70, (-1, -1))
        tensors = dict(
            zip("qkv", (x.to(dtype) for x in inputs(shape, (2, 1), (8, 8))[:3]), strict=True)
        )
        tensors[name][0, index, 0, 3] = math.nan
        scores = TileScores(SCALE, shape.window)
        out, lse = kernel.forward(**tensors, scores=scores)
        expected_out, expected_lse = REFERENCE.forward(**tensors, scores=scores)
        assert torch.equal(out.isnan(), expected_out.isnan()), (name, index)
        assert torch.equal(lse.isnan(), expected_lse.isnan()), (name, index)
        assert bool(out.isnan().any()) and not bool(out.isnan().all())


def test_infinite_scores(kernel):
    shape = Shape(70, 70, (-1, -1))
    q, k, v, _ = (x.float() for x in inputs(shape, (1, 1), (4, 4), batch=1))
    q[0, :, 0, 1] = q[0, :, 0, 1].abs() + 0.1
    k[0, 66, 0, 1] = math.inf  # one key's scores are inf
    scores = TileScores(1.0, (-1, -1))
    out, lse = kernel.forward(q, k, v, scores)
    assert bool(out.isnan().all()) and bool((lse == math.inf).all())
    k[0, 66, 0, 1] = -math.inf  # and -inf: as if the key were hidden
    tensors = q, k, v
    found, expected = kernel.forward(*tensors, scores), REFERENCE.forward(*tensors, scores)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hidden", [-math.inf, torch.finfo(torch.float32).min])
def test_a_bias_may_hide_keys_and_rows(kernel, hidden):
    nq, nk = 70, 66
    mods = mods_of(nq, nk, 2, torch.float32)["bias"]
    bias = mods.bias.clone()
    bias[..., :65] = hidden
    bias[:, :, 3] = bias[:, :, 64] = -math.inf
    shape = Shape(nq, nk, (-1, -1))
    tensors = [x.float() for x in inputs(shape, (2, 1), (8, 8))]
    compare_with_definition(kernel, *tensors, shape.window, mods=replace(mods, bias=bias))


# Memory.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", STRIDES, ids=lambda f: f.__name__)
def test_strided_inputs(best, strided, dtype):
    for shape in (Shape(12, 12, (-1, 0)), Shape(70, 76, (10, 5))):
        tensors = [x.to(dtype) for x in inputs(shape, (4, 2), (6, 3), batch=1)]
        for n in range(4):
            mixed = [strided(x) if m == n else x for m, x in enumerate(tensors)]
            check_tile(best, shape, *mixed)
        check_tile(best, shape, *map(strided, tensors))


def test_the_expanded_gradient_of_a_sum(best):
    shape = Shape(40, 40, (12, 0))
    q, k, v, dout = (x.float() for x in inputs(shape, (2, 1), (8, 8)))
    check_tile(best, shape, q, k, v, torch.ones(()).expand(dout.shape))


def test_gradients_are_fresh_tensors(best):
    """The engine keeps them and adds to them: they must not share memory with an input."""
    shape = Shape(20, 20, (-1, 0))
    q, k, v, dout = (x.float() for x in inputs(shape))
    out, lse, *grads, _ = both_passes(best, TileScores(1.0, shape.window), q, k, v, dout)
    memory = [x.untyped_storage().data_ptr() for x in (q, k, v, dout, out, lse, *grads)]
    assert len(set(memory)) == len(memory)


@pytest.mark.parametrize(("heads", "batch"), [((1, 1), 1), ((4, 1), 1), ((6, 3), 1), ((2, 2), 2)])
def test_threads_change_next_to_nothing(best, heads, batch):
    """Few KV heads are shared out among threads; a number of threads always gives the same bits."""
    shape = Shape(700, 700, (-1, 0))
    q, k, v, dout = (x.float() for x in inputs(shape, heads, (24, 16), batch))
    found = {}
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        first, again = (results(best, shape, q, k, v, dout) for _ in range(2))
        assert all(map(torch.equal, first, again)), threads
        found[threads] = first
    for threads in (2, 3, 8):
        for n, (one, several) in enumerate(zip(found[1], found[threads], strict=True)):
            if n < 3:  # out, lse and dq: no sum is divided
                assert torch.equal(one, several), (n, threads)
            assert relative_l2(several, one.double()) < 1e-6, (n, threads)


@pytest.mark.full
def test_sanitizers_find_nothing(tmp_path):
    """These tests over a library that checks every address and every undefined operation."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    asan = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g"
    environment = os.environ | {
        "XDG_CACHE_HOME": str(tmp_path),
        "CXX": f"{compiler} {flags}",
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    build = "from nnscaler_ring.core.kernels.native.library import build; build()"
    subprocess.run([sys.executable, "-c", build], env=environment, check=True)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "not full",
            "-p",
            "no:cacheprovider",
            __file__,
        ],
        env=environment | {"LD_PRELOAD": asan},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
