"""The tolerances of all tests, with the origin of each, and the assertions that use them.

The measurements behind them: torch 2.13.0 on CPU, torch's fused attention against dense float64,
causal, 64 to 2048 tokens, 4 query heads on 2 key heads of 64, standard normal inputs.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    limit: float
    origin: str


FLOAT64_ABSOLUTE = Tolerance(
    1e-10,
    "noise is 1e-14 at most; a mask that is wrong by one key is off by 1e-2 at 4096 tokens",
)

# Relative L2 error against dense float64, for any number of tokens.
RELATIVE_L2 = {
    torch.float32: Tolerance(2e-6, "one device is at 5e-7; 4 times that for more merges"),
    torch.float16: Tolerance(3e-3, "one device is at 7e-4; 4 times that for short sequences"),
    torch.bfloat16: Tolerance(2e-2, "one device is at 6e-3; 3.5 times that, and 5 roundings"),
}

FLOAT32_ON_TENSOR_CORES = Tolerance(
    3e-5,
    "torch's memory-efficient kernel on CUDA: a product is three of TF32, and every step of a sum "
    "is cut off; 9e-6 at 640 keys in an emulation of that; not yet measured on a GPU",
)

# Several ranks may have this many times the relative L2 error of one device.
RATIO_TO_ONE_DEVICE = Tolerance(
    1.25, "partial results are merged in float32, so that ranks should add next to nothing"
)
# Where scores differ so much that one device's error is the rounding of its result alone.
RATIO_TO_ONE_ROUNDING = Tolerance(
    1.45, "the fused kernel rounds a tile's part of out too: two roundings, sqrt(2)"
)
RATIO_MIN_TOKENS = 1024  # with fewer tokens the ratio of two roundings is chance


def relative_l2(actual: Tensor, expected: Tensor, *, floor: float = 0.0) -> float:
    """The relative error |actual - expected| / max(|expected|, floor), in float64."""
    expected = expected.detach().to(torch.float64)
    error = torch.linalg.vector_norm(actual.detach().to(torch.float64) - expected).item()
    size = max(torch.linalg.vector_norm(expected).item(), floor)
    if size == 0:
        return 0.0 if error == 0 else math.inf
    return error / size


def assert_close_float64(actual: Tensor, expected: Tensor, what: str) -> None:
    """Every element within FLOAT64_ABSOLUTE; -inf must stand at the same places, NaN nowhere."""
    assert actual.dtype == torch.float64, f"{what}: expected float64, got {actual.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    actual, expected = actual.detach(), expected.detach().to(torch.float64)
    same_infinity = (actual == expected) & (expected == -math.inf)
    difference = torch.where(same_infinity, 0.0, (actual - expected).abs()).nan_to_num(nan=math.inf)
    if difference.numel() == 0 or difference.max() <= FLOAT64_ABSOLUTE.limit:
        return
    where = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    wrong = int((difference > FLOAT64_ABSOLUTE.limit).sum())
    raise AssertionError(
        f"{what}: largest error {difference[where]:.3e} at {where}: got {actual[where]:.17g}, "
        f"expected {expected[where]:.17g}; {wrong} of {difference.numel()} elements are more than "
        f"{FLOAT64_ABSOLUTE.limit:g} off"
    )


def assert_close_relative(
    actual: Tensor,
    expected: Tensor,
    what: str,
    *,
    floor: float = 0.0,
    kernel: str | None = None,
) -> None:
    """Relative L2 error within the limit of actual's dtype: float32, float16 or bfloat16.

    `floor`: what the norm of `expected` counts as at least, where sums may cancel to next to 0.
    `kernel`: that computed it on a GPU; "auto" is torch's in float32.
    """
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    limit = RELATIVE_L2[actual.dtype].limit
    if actual.dtype == torch.float32 and kernel in ("auto", "torch_cuda"):
        limit = FLOAT32_ON_TENSOR_CORES.limit
    error = relative_l2(actual, expected, floor=floor)
    assert error <= limit, f"{what}: relative L2 error {error:.3e} > {limit:g} ({actual.dtype})"


def assert_as_good_as_one_device(
    actual: Tensor,
    one_device: Tensor,
    expected: Tensor,
    what: str,
    ratio: Tolerance = RATIO_TO_ONE_DEVICE,
) -> None:
    """The error of `actual` is at most `ratio` times that of one device's kernel."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    error, reference = relative_l2(actual, expected), relative_l2(one_device, expected)
    limit = ratio.limit
    assert error <= limit * reference, (
        f"{what}: relative L2 error {error:.3e} is more than {limit} times {reference:.3e}, "
        f"the error of one device ({actual.dtype})"
    )
