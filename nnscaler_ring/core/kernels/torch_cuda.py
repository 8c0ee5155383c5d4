"""torch's own CUDA attention: nothing to install. Not yet run on a GPU.

Half precision goes to the flash kernel, or to cuDNN where that is faster; float32 to the
memory-efficient kernel; what none of them has (float64, softcap, ALiBi, bias, dropout) is computed
in plain torch, in blocks of scores. Dropout too: our mask is a function of global coordinates, the
same on any number of ranks, which a fused kernel's own generator cannot give.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor

from nnscaler_ring.core.kernels.aten_flash import AtenFlash
from nnscaler_ring.core.kernels.contract import AttentionKernel, BackwardTensors, Problem
from nnscaler_ring.core.kernels.flash_form import HEAD_DIMS, FlashCall, FlashKernel
from nnscaler_ring.core.kernels.head_dims import round_up
from nnscaler_ring.core.kernels.score_blocks import ScoreBlocks
from nnscaler_ring.core.kernels.torch_efficient import Efficient

logger = logging.getLogger(__name__)

aten = torch.ops.aten

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALF)
CUDNN_HEAD_DIM = 128
"""cuDNN's kernels take larger ones on some devices and versions only."""
CUDNN_ROWS = 128
"""Query rows and keys are a multiple of this, see `Cudnn`; and every other shape costs a plan."""


class TorchCuda:
    """Memory O(rows); whichever of torch's kernels fits the dtype, the device and the tile."""

    name = "torch_cuda"

    def supports(self, problem: Problem) -> str | None:
        """CUDA tensors of any floating dtype; not deterministic matrix products."""
        if problem.device_type != "cuda":
            return f"it computes on cuda, the tensors are on {problem.device_type}"
        if torch.version.hip is not None:
            return "this torch is built for ROCm, whose kernels keep another contract"
        if problem.dtype not in DTYPES:
            return f"it computes in {', '.join(map(str, DTYPES))}, not in {problem.dtype}"
        reason = not_fused(problem)
        if problem.deterministic and reason is not None:
            return (
                f"it computes {reason} in matrix products, which promise no bitwise repeatability"
            )
        return None

    def prepared(self, problem: Problem) -> AttentionKernel:
        """The kernel of torch that computes such calls."""
        reason = not_fused(problem)
        if reason is not None:
            logger.debug("torch_cuda: blocks of scores, for %s", reason)
            return ScoreBlocks(self.name)
        if not has_flash(problem):
            logger.debug("torch_cuda: the memory-efficient kernel")
            return Efficient(self.name, problem.deterministic)
        library = Cudnn() if has_cudnn(problem) else AtenFlash()
        logger.debug("torch_cuda: %s", type(library).__name__)
        return FlashKernel(self.name, library, problem)


def not_fused(problem: Problem) -> str | None:
    """What in a problem none of torch's fused kernels has; None for nothing."""
    for option in ("softcap", "alibi", "bias", "dropout"):
        if getattr(problem, option):
            return option
    if problem.dtype == torch.float64:
        return "float64"
    if problem.dtype == torch.bfloat16 and not has_flash(problem):
        return "bfloat16 of this head_dim or on this device"
    return None


def has_flash(problem: Problem) -> bool:
    """Whether torch's flash kernel computes a problem without score modifications."""
    head_dim = max(problem.head_dim, problem.v_head_dim)
    major, minor = problem.compute_capability or (8, 0)
    if (major == 8 and minor) or major == 12:
        # Smaller shared memory: torch's own checks allow no backward above it.
        return problem.dtype in HALF and head_dim <= 192
    return problem.dtype in HALF and head_dim <= HEAD_DIMS[-1] and major >= 8


def has_cudnn(problem: Problem) -> bool:
    """Whether cuDNN is the fast path for the problem's dense tiles."""
    head_dim = round_up(max(problem.head_dim, problem.v_head_dim), 8)
    major, _ = problem.compute_capability or (8, 0)
    return major in (9, 10) and head_dim <= CUDNN_HEAD_DIM and not problem.deterministic


class Cudnn:
    """cuDNN's attention for full and square causal tiles of whole blocks, else `AtenFlash`.

    cuDNN's tensors are [b, h, rows, d], its causal mask is aligned at the top left corner. Its
    softmax_lse is [b, h, rows] or [b, h, rows, 1], depending on torch, which wants it back so.

    torch keeps the plans of cuDNN by the sizes and strides of q, k and v, up to 2.13 not by those
    of out and dout: a plan made for others of theirs would read them wrongly, without an error. So
    in the backward pass q, out and dout are dense and alike, as in `scaled_dot_product_attention`,
    which shares the plans.

    On Hopper its backward, at least in 9.19 to 9.26, may take what is behind the last row or key of
    a block for a score of 0, which overflows to NaN where softmax_lse is below -88. So there must
    be nothing behind: see pytorch/pytorch#196678 and NVIDIA/cudnn-frontend#1072.
    """

    def __init__(self) -> None:
        self._flash = AtenFlash()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: FlashCall) -> tuple[Tensor, Tensor]:
        if not _is_for_cudnn(q, k, call):
            return self._flash.forward(q, k, v, call)
        out, softmax_lse, *_ = aten._scaled_dot_product_cudnn_attention(
            *(x.transpose(1, 2) for x in (q, k, v)),
            None,
            True,
            0.0,
            call.causal,
            False,
            scale=call.softmax_scale,
        )
        return out.transpose(1, 2), softmax_lse.reshape(out.shape[:-1])

    def backward(self, tensors: BackwardTensors, call: FlashCall) -> tuple[Tensor, Tensor, Tensor]:
        dout, _, q, k, v, out, softmax_lse = tensors
        if not _is_for_cudnn(q, k, call):
            return self._flash.backward(tensors, call)
        no_dropout = q.new_empty((), dtype=torch.int64)
        dout, q, out = (x.contiguous() for x in (dout, q, out))
        gradients = aten._scaled_dot_product_cudnn_attention_backward(
            *(x.transpose(1, 2) for x in (dout, q, k, v, out)),
            softmax_lse.unsqueeze(-1) if _has_lse_column(q.dtype, q.device) else softmax_lse,
            no_dropout,
            no_dropout,
            None,
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            call.causal,
            scale=call.softmax_scale,
        )
        dq, dk, dv = (x.transpose(1, 2) for x in gradients)
        return dq, dk, dv


def _is_for_cudnn(q: Tensor, k: Tensor, call: FlashCall) -> bool:
    return (
        call.packed is None
        and (call.left, call.right) == (-1, -1)
        and (not call.causal or q.shape[1] == k.shape[1])
        and q.shape[1] % CUDNN_ROWS == k.shape[1] % CUDNN_ROWS == 0
        # The columns of a gradient of the lse may have made it wider.
        and q.shape[-1] <= CUDNN_HEAD_DIM
    )


@lru_cache(maxsize=64)
def _has_lse_column(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether cuDNN's softmax_lse has a last dim of 1 in this torch: a shape, not waited for."""
    x = torch.zeros(1, 1, CUDNN_ROWS, 64, dtype=dtype, device=device)
    _, softmax_lse, *_ = aten._scaled_dot_product_cudnn_attention(
        x, x, x, None, True, 0.0, False, False, scale=1.0
    )
    return softmax_lse.dim() == 4
