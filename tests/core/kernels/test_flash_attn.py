"""Every supported version of flash-attn, without a GPU: our calls bind to its signature, and its
results, computed densely by its own conventions, are taken right.
"""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nnscaler_ring.core.engine import attention_backward, attention_forward
from nnscaler_ring.core.kernels import (
    BackwardTensors,
    Problem,
    flash_attn,
    kernel_refusals,
    select_kernel,
)
from nnscaler_ring.core.kernels.flash_attn import FLASH_ATTN, Library, lacks, parameters_of
from nnscaler_ring.core.kernels.flash_form import FlashKernel
from nnscaler_ring.core.scores.scores import Scores
from tests.core.kernels.flash_attn_versions import VERSIONS, Recorder
from tests.core.kernels.test_reference import (
    OneDevice,
    Shape,
    check_shares,
    check_tile,
    inputs,
    one_thread,  # noqa: F401
    random_shapes,
    tile_of,
)
from tests.core.plan.test_schedule import packed_problem, random_problems
from tests.core.test_engine import check as check_schedule
from tests.oracle import Mods, dense_gradients
from tests.tolerances import assert_close_float64

CAPABILITIES = {"flash_attn": (8, 0), "flash_attn_3": (9, 0), "flash_attn_4": (10, 0)}


def problem_for(name: str) -> Problem:
    capability = CAPABILITIES[VERSIONS[name].kernel]
    return Problem("cuda", torch.bfloat16, 4, 2, 64, 64, compute_capability=capability)


@pytest.fixture(params=list(VERSIONS))
def version(request):
    return request.param


@pytest.fixture
def recorder(version):
    return Recorder(VERSIONS[version])


@pytest.fixture
def kernel(version, recorder):
    problem = problem_for(version)
    return FlashKernel(VERSIONS[version].kernel, Library(recorder.functions), problem)


def test_tiles_equal_dense(kernel):
    for shape in random_shapes(1, 15, size=12):
        check_tile(kernel, shape, *inputs(shape, (6, 2), (4, 2)))
    rng = random.Random(3)
    for shape in random_shapes(3, 10, size=10):
        check_shares(kernel, shape, rng.randint(0, shape.nk))


def test_any_layout_mask_and_packing_equals_dense(kernel):
    for seed, problem in enumerate(random_problems(33, 20)):
        check_schedule(problem, seed, 1 + seed % 2, kernel)


def test_packed_documents_are_one_call(recorder, kernel):
    cu = (0, 3, 4, 4, 11, 20)
    problem = packed_problem("contiguous", "contiguous", [20], [20], cu, cu, True, (4, -1))
    check_schedule(problem, 0, 1, kernel)
    assert len(recorder.calls) == 2
    for _, given in recorder.calls:
        assert given["cu_seqlens_q"].tolist() == [0, 3, 4, 11, 20]
        assert given["max_seqlen_q"] == given["max_seqlen_k"] == 9


@pytest.mark.parametrize("dims", [(40, 24), (64, 64), (112, 112), (192, 128)], ids=str)
def test_flash_attn_4_is_given_head_dims_that_it_compiles(dims):
    recorder = Recorder(VERSIONS["4.0.0b36"])
    offer = replace(FLASH_ATTN["flash_attn_4"], load=lambda: recorder.functions)
    problem = Problem("cuda", torch.bfloat16, 4, 2, *dims, compute_capability=(9, 0))
    assert offer.supports(problem) is None
    shape = Shape(9, 9, (-1, 0))
    check_tile(offer.prepared(problem), shape, *inputs(shape, (4, 2), dims))
    assert recorder.calls
    for _, given in recorder.calls:
        assert given["q"].shape[-1] == given["k"].shape[-1] == given["v"].shape[-1]
        assert given["q"].shape[-1] in (64, 96, 128, 256)
    small = replace(problem, compute_capability=(10, 0))
    assert (offer.supports(small) is None) is (max(dims) <= 128)


def test_half_precision_stays_half(recorder, kernel):
    shape = Shape(9, 9, (-1, 0))
    check_tile(kernel, shape, *(x.to(torch.bfloat16) for x in inputs(shape, (4, 2), (16, 16))))
    for _, given in recorder.calls:
        for name, x in given.items():
            if isinstance(x, Tensor):
                assert x.dtype == (torch.float32 if "lse" in name else torch.bfloat16), name


def test_deterministic_is_passed_on(version, recorder):
    shape = Shape(5, 5, (-1, 0))
    for deterministic in (False, True):
        recorder.calls.clear()
        problem = replace(problem_for(version), deterministic=deterministic)
        check_tile(FlashKernel("x", Library(recorder.functions), problem), shape, *inputs(shape))
        assert [given["deterministic"] for _, given in recorder.calls[1:]] == [deterministic]


def test_softcap_is_the_librarys(version, recorder, kernel):
    """Or refused: flash-attn 2.5 has none, that of flash-attn 4 is not for packed gradients."""
    problem = replace(problem_for(version), softcap=True)
    offer = FLASH_ATTN[VERSIONS[version].kernel]
    reason = offer.limits(problem) or lacks(recorder.functions, problem)
    if version.startswith(("2.5", "4")):
        assert reason is not None and "has no softcap" in reason
        return
    assert reason is None
    shape = Shape(7, 9, (5, 0))
    q, k, v, dout = inputs(shape, (4, 2))
    cu, cu_k = (0, 4, 7), (0, 5, 9)
    schedule = packed_problem(
        "contiguous", "contiguous", [7], [9], cu, cu_k, True, (-1, -1)
    ).schedule
    for tiles, options in (
        ([tile_of(shape)], {"window_size": shape.window}),
        (schedule.tiles(0, (0,)), {"cu_seqlens_q": cu, "cu_seqlens_k": cu_k, "causal": True}),
    ):
        packed = "cu_seqlens_q" in options
        tensors = [x[0] for x in (q, k, v, dout)] if packed else [q, k, v, dout]
        expected = dense_gradients(*tensors, softmax_scale=0.3, mods=Mods(softcap=1.5), **options)
        mine = [x[:1] for x in (q, k, v, dout)] if packed else [q, k, v, dout]
        scores = Scores(0.3, schedule, softcap=1.5)
        call = {"exchange": OneDevice(*tiles), "kernel": kernel, "scores": scores}
        out, lse = attention_forward(*mine[:3], **call)
        grads = attention_backward(BackwardTensors(mine[3], None, *mine[:3], out, lse), **call)[:3]
        for actual, wanted in zip((out, lse, *grads), expected, strict=True):
            assert_close_float64(actual[0] if packed else actual, wanted, f"{version}, {options}")


def test_gradients_through_the_lse_equal_dense(kernel):
    for shape in (Shape(6, 6, (-1, 0)), Shape(9, 7, (3, 2))):
        q, k, v, dout = inputs(shape, (4, 2))
        dlse = torch.randn(2, 4, shape.nq, dtype=torch.float64)
        options = {"softmax_scale": 0.3, "window_size": shape.window}
        expected = dense_gradients(q, k, v, dout, dlse=dlse, **options)
        call = {"exchange": OneDevice(tile_of(shape)), "kernel": kernel, "scores": Scores(0.3)}
        out, lse = attention_forward(q, k, v, **call)
        grads = attention_backward(BackwardTensors(dout, dlse, q, k, v, out, lse), **call)[:3]
        for actual, wanted in zip(grads, expected[2:], strict=True):
            assert_close_float64(actual, wanted, str(shape))


def test_no_version_lacks_what_a_call_needs(version, recorder):
    assert lacks(recorder.functions, problem_for(version)) is None


# Versions that we do not know.


def test_a_version_without_windows_is_refused(version, recorder):
    def forward(q, k, v, dropout_p, softmax_scale, causal, return_softmax):
        pass

    functions = recorder.functions._replace(forward=forward)
    reason = lacks(functions, problem_for(version))
    assert reason == "this version's forward has no window_size"


def test_a_version_that_needs_more_is_refused(version, recorder):
    def forward(q, k, v, softmax_scale, causal, window_size, phase_of_the_moon):
        pass

    functions = recorder.functions._replace(forward=forward)
    reason = lacks(functions, problem_for(version))
    assert reason == "this version's forward needs phase_of_the_moon: unknown here"


def test_the_signature_behind_a_torch_op():
    @torch.library.custom_op("nnscaler_ring_tests::half", mutates_args=())
    def half(x: Tensor, softcap: float = 0.0) -> Tensor:
        return x / 2

    assert list(parameters_of(half)) == ["x", "softcap"]


# Selection.


@pytest.fixture
def packages(monkeypatch):
    """Pretends that versions are installed: maps kernel names to what `load` does."""

    def install(**loads):
        for name, load in loads.items():
            offer = replace(FLASH_ATTN[name], load=load)
            monkeypatch.setitem(FLASH_ATTN, name, offer)
        from nnscaler_ring.core import kernels

        kernels.offer_of.cache_clear()

    yield install
    from nnscaler_ring.core import kernels

    monkeypatch.undo()
    kernels.offer_of.cache_clear()


def functions_of(name: str):
    return Recorder(VERSIONS[name]).functions


def test_what_is_not_installed_says_how_to_get_it():
    for name, problem in zip(
        ("flash_attn", "flash_attn_3", "flash_attn_4"),
        (problem_for(x) for x in ("2.8.3", "3 of main", "4.0.0b14")),
        strict=True,
    ):
        flash_attn.installed.cache_clear()
        reason = kernel_refusals(problem)[name]
        assert reason is not None and "is not installed; " in reason, reason


def test_a_package_that_cannot_be_imported_is_not_a_crash(packages):
    def broken():
        raise OSError("libcudart.so.12: no such file")

    packages(flash_attn=broken)
    reason = kernel_refusals(problem_for("2.8.3"))["flash_attn"]
    assert "cannot be used here (OSError: libcudart.so.12" in reason


def test_nothing_is_imported_for_cpu_tensors(packages):
    def load():
        raise AssertionError("imported")

    packages(flash_attn=load, flash_attn_3=load, flash_attn_4=load)
    problem = replace(problem_for("2.8.3"), device_type="cpu")
    assert select_kernel("auto", problem).name in ("cpu_tiles", "torch_cpu")
    assert "on cpu" in kernel_refusals(problem)["flash_attn"]


def test_auto_takes_flash_attn_3_on_hopper_and_flash_attn_for_a_softcap(packages):
    hopper, ampere = problem_for("3 of main"), problem_for("2.8.3")
    assert select_kernel("auto", hopper).name == "torch_cuda"
    packages(
        flash_attn=lambda: functions_of("2.8.3"), flash_attn_3=lambda: functions_of("3 of main")
    )
    assert select_kernel("auto", hopper).name == "flash_attn_3"
    assert select_kernel("auto", ampere).name == "torch_cuda"
    assert select_kernel("auto", replace(ampere, softcap=True)).name == "flash_attn"
    assert select_kernel("auto", replace(hopper, softcap=True)).name == "flash_attn_3"
    assert select_kernel("auto", replace(hopper, softcap=True, bias=True)).name == "torch_cuda"
    assert select_kernel("auto", replace(hopper, dtype=torch.float32)).name == "torch_cuda"


@pytest.mark.parametrize(
    ("version", "changes", "reason"),
    [
        ("2.8.3", {"dtype": torch.float32}, "in bfloat16 and float16, not in torch.float32"),
        ("2.8.3", {"compute_capability": (7, 5)}, "the device has 7.5"),
        ("2.8.3", {"v_head_dim": 264}, "its head dims end at 256, got 264"),
        ("2.8.3", {"alibi": True}, "from the corner of a tile"),
        ("2.8.3", {"bias": True}, "takes no bias"),
        ("2.8.3", {"dropout": True}, "depends on how the sequence is cut"),
        ("3 of main", {"compute_capability": (8, 0)}, "it runs on compute capability 9.x"),
        ("3 of main", {"head_dim": 256, "deterministic": True}, "no deterministic backward"),
        ("4.0.0b36", {"head_dim": 192}, "its head dims end at 128, got 192"),
        (
            "4.0.0b36",
            {"compute_capability": (12, 0), "deterministic": True},
            "no deterministic backward",
        ),
    ],
    ids=str,
)
def test_what_is_refused(packages, version, changes, reason):
    name = VERSIONS[version].kernel
    packages(**{name: lambda: functions_of(version)})
    problem = problem_for(version)
    assert kernel_refusals(problem)[name] is None
    refusal = kernel_refusals(replace(problem, **changes))[name]
    assert refusal is not None and reason in refusal
