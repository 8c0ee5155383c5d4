"""flash-attn 2.5 to 2.8, 3 and 4, the installed package, in the calling form of flash_form.py.

Not yet run on a GPU.

Their functions differ from version to version in names, order and number of arguments, so a call is
built from the signature at hand: what it says goes by keyword, what a version asks for beyond that
has a value that changes nothing, and a version that lacks what a call needs is refused.

Source: Dao, "FlashAttention-2", arXiv 2307.08691; Shah et al., "FlashAttention-3", arXiv
2407.08608; the packages' own interfaces, read at the tags that the tests name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnscaler_ring.core.kernels.contract import AttentionKernel, BackwardTensors, Problem
from nnscaler_ring.core.kernels.flash_form import HEAD_DIMS, FlashCall, FlashKernel, Packed

HALF = (torch.bfloat16, torch.float16)

NEUTRAL: dict[str, Any] = {
    "dropout_p": 0.0,
    "softcap": 0.0,
    "return_softmax": False,
} | dict.fromkeys(
    (
        *("alibi_slopes", "block_table", "page_table", "leftpad_k", "seqused_q", "seqused_k"),
        *("sequed_q", "sequed_k", "k_new", "v_new", "cu_seqlens_k_new", "kv_batch_idx", "qv"),
        *("rotary_cos", "rotary_sin", "seqlens_rotary", "q_descale", "k_descale", "v_descale"),
        *("out", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
    )
)
"""Arguments that some version has no default for, and what stands for nothing."""


class Functions(NamedTuple):
    """The four calls of a package, and what it reads as an edge that cuts nothing."""

    forward: Callable[..., Any]
    packed_forward: Callable[..., Any]
    backward: Callable[..., Any]
    packed_backward: Callable[..., Any]
    unbounded: int | None


def flash_attn_2() -> Functions:
    """flash-attn 2.5 to 2.8."""
    module = import_module("flash_attn.flash_attn_interface")
    return Functions(
        module._flash_attn_forward,
        module._flash_attn_varlen_forward,
        module._flash_attn_backward,
        module._flash_attn_varlen_backward,
        -1,
    )


def flash_attn_3() -> Functions:
    """FlashAttention-3, whose functions take both forms."""
    module = import_module("flash_attn_interface")
    forward, backward = module._flash_attn_forward, module._flash_attn_backward
    return Functions(forward, forward, backward, backward, -1)


def flash_attn_4() -> Functions:
    """FlashAttention-4, whose functions take both forms."""
    module = import_module("flash_attn.cute.interface")
    forward, backward = module._flash_attn_fwd, module._flash_attn_bwd
    return Functions(forward, forward, backward, backward, None)


@dataclass(frozen=True)
class FlashAttn:
    """A kernel of `KERNELS` over one generation of the package.

    Args:
        name: of the kernel.
        load: imports the package.
        install: how to get it.
        devices: compute capabilities by major number.
        head_dims: those that it computes in every call, ascending; others are padded.
        smaller_devices: major numbers of devices on which they end at 128.
        softcap: whether forward and backward have one, dense and packed.
        deterministic_head_dim: the largest that a deterministic backward takes.
        not_deterministic: major numbers of devices without one.
    """

    name: str
    load: Callable[[], Functions]
    install: str
    devices: tuple[int, ...]
    head_dims: Sequence[int] = HEAD_DIMS
    smaller_devices: tuple[int, ...] = ()
    softcap: bool = True
    deterministic_head_dim: int = HEAD_DIMS[-1]
    not_deterministic: tuple[int, ...] = ()

    def supports(self, problem: Problem) -> str | None:
        """Half precision on the generation's devices, where the package is installed."""
        reason = self.limits(problem)
        if reason is not None:
            return reason
        functions = installed(self.load)
        if isinstance(functions, str):
            return f"{functions}; {self.install}"
        return lacks(functions, problem)

    def limits(self, problem: Problem) -> str | None:
        """What it refuses where it is installed."""
        if problem.device_type != "cuda":
            return f"it computes on cuda, the tensors are on {problem.device_type}"
        if problem.dtype not in HALF:
            return f"it computes in bfloat16 and float16, not in {problem.dtype}"
        major, minor = problem.compute_capability or (self.devices[0], 0)
        if major not in self.devices:
            known = ", ".join(f"{major}.x" for major in self.devices)
            return f"it runs on compute capability {known}, the device has {major}.{minor}"
        head_dim = max(problem.head_dim, problem.v_head_dim)
        largest = self.head_dims_of(problem)[-1]
        if head_dim > largest:
            return f"its head dims end at {largest}, got {head_dim}"
        if problem.alibi:
            return "its ALiBi counts from the corner of a tile, not in the sequence"
        if problem.bias:
            return "it takes no bias"
        if problem.dropout:
            return "what its dropout drops depends on how the sequence is cut"
        if problem.softcap and not self.softcap:
            return "its packed backward has no softcap"
        if problem.deterministic and (
            major in self.not_deterministic or head_dim > self.deterministic_head_dim
        ):
            return f"it has no deterministic backward for head_dim {head_dim} on {major}.{minor}"
        return None

    def head_dims_of(self, problem: Problem) -> Sequence[int]:
        """On the problem's device."""
        major, _ = problem.compute_capability or (self.devices[0], 0)
        largest = 128 if major in self.smaller_devices else self.head_dims[-1]
        return tuple(dim for dim in self.head_dims if dim <= largest)

    def prepared(self, problem: Problem) -> AttentionKernel:
        """The package behind the form."""
        functions = installed(self.load)
        assert not isinstance(functions, str), functions
        library = Library(functions)
        return FlashKernel(self.name, library, problem, self.head_dims_of(problem))


FLASH_ATTN = {
    offer.name: offer
    for offer in (
        FlashAttn(
            name="flash_attn",
            load=flash_attn_2,
            install="pip install 'flash-attn>=2.5,<3'",
            devices=(8, 9, 10, 11, 12),
        ),
        FlashAttn(
            name="flash_attn_3",
            load=flash_attn_3,
            install="build it from the folder hopper of github.com/Dao-AILab/flash-attention",
            devices=(9,),
            deterministic_head_dim=192,
        ),
        FlashAttn(
            name="flash_attn_4",
            load=flash_attn_4,
            install="pip install flash-attn-4",
            devices=(9, 10, 11, 12),
            # Of others, some do not compile on some devices in some versions: 104 without a mask on
            # 9.0 up to 4.0.0b36, 192 up to b30 (tests/core/kernels/test_fake_gpu.py).
            head_dims=(64, 96, 128, 256),
            smaller_devices=(10, 11, 12),
            softcap=False,
            not_deterministic=(12,),
        ),
    )
}
"""By kernel name."""


@lru_cache(maxsize=8)
def installed(load: Callable[[], Functions]) -> Functions | str:
    """The package's functions, or why there are none."""
    try:
        return load()
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"the package cannot be used here ({type(error).__name__}: {error})"


@lru_cache(maxsize=256)
def lacks(functions: Functions, problem: Problem) -> str | None:
    """What this version has no argument for; None for nothing."""
    needed = [("softmax_scale",), ("causal", "is_causal"), ("window_size", "window_size_left")]
    if problem.softcap:
        needed.append(("softcap",))
    packed = [("cu_seqlens_q",), ("cu_seqlens_k",)]
    gradients = [("dq",), ("dk",), ("dv",), ("deterministic",)]
    for function, names in (
        (functions.forward, needed),
        (functions.packed_forward, needed + packed),
        (functions.backward, needed + gradients),
        (functions.packed_backward, needed + packed + gradients),
    ):
        parameters = parameters_of(function)
        for alternatives in names:
            if not any(name in parameters for name in alternatives):
                return f"this version's {name_of(function)} has no {alternatives[0]}"
        unknown = [
            name
            for name, parameter in parameters.items()
            if parameter.default is parameter.empty and name not in KNOWN
        ]
        if unknown:
            return f"this version's {name_of(function)} needs {', '.join(unknown)}: unknown here"
    return None


@dataclass(frozen=True)
class Library:
    """A package's functions as a `FlashLibrary`."""

    functions: Functions

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: FlashCall) -> tuple[Tensor, Tensor]:
        function = self.functions.forward if call.packed is None else self.functions.packed_forward
        tensors = {"q": q, "k": k, "v": v, "return_lse": True}
        results = function(**arguments(function, tensors | self._said(call)))
        # Before 2.7 flash-attn returns its inputs, too: (out, q, k, v, out_padded, lse, mask, rng).
        out, softmax_lse = results[0], results[5 if len(results) == 8 else 1]
        if call.packed is not None and softmax_lse.dim() == 3:
            softmax_lse = rows_of_segments(softmax_lse, call.packed, q.shape[0])
        return out, softmax_lse

    def backward(self, tensors: BackwardTensors, call: FlashCall) -> tuple[Tensor, Tensor, Tensor]:
        dout, _, q, k, v, out, softmax_lse = tensors
        function = self.functions.backward
        if call.packed is not None:
            function = self.functions.packed_backward
            if "softcap" not in parameters_of(function):
                # flash-attn 2.5, the last with a packed lse of [segments, h, longest].
                softmax_lse = segments_of_rows(softmax_lse, call.packed)
        # Written in place: what is returned is another thing in every version.
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        named = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "dq": dq, "dk": dk, "dv": dv}
        said = self._said(call) | {"softmax_lse": softmax_lse, "lse": softmax_lse}
        function(**arguments(function, named | said | {"deterministic": call.deterministic}))
        return dq, dk, dv

    def _said(self, call: FlashCall) -> dict[str, Any]:
        left, right = (
            self.functions.unbounded if edge < 0 else edge for edge in (call.left, call.right)
        )
        said = {
            "softmax_scale": call.softmax_scale,
            "causal": call.causal,
            "is_causal": call.causal,
            "window_size": (left, right),
            "window_size_left": left,
            "window_size_right": right,
        }
        if call.softcap:
            said["softcap"] = call.softcap
        return said if call.packed is None else said | call.packed._asdict()


KNOWN = {
    *NEUTRAL,
    *("q", "k", "v", "dout", "out", "softmax_lse", "lse", "dq", "dk", "dv"),
    *("softmax_scale", "causal", "is_causal", "deterministic"),
    *("window_size", "window_size_left", "window_size_right"),
}
"""Arguments without a default that a version may have."""


def arguments(function: Callable[..., Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of one call: what is said, and what the function asks for beyond that."""
    chosen = {}
    for name, parameter in parameters_of(function).items():
        if name in said:
            chosen[name] = said[name]
        elif parameter.default is parameter.empty:
            chosen[name] = NEUTRAL[name]
    return chosen


@lru_cache(maxsize=32)
def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Of a function, or of the function that a torch custom op was made from."""
    return inspect.signature(getattr(function, "_init_fn", function)).parameters


def name_of(function: Callable[..., Any]) -> str:
    """As its package calls it."""
    return str(getattr(function, "__name__", None) or getattr(function, "_name", function))


def rows_of_segments(softmax_lse: Tensor, packed: Packed, rows: int) -> Tensor:
    """[segments, h, longest] as [h, rows]."""
    segment, place = _places(packed, rows)
    return softmax_lse[segment, :, place].transpose(0, 1)


def segments_of_rows(softmax_lse: Tensor, packed: Packed) -> Tensor:
    """[h, rows] as [segments, h, longest]."""
    num_heads, rows = softmax_lse.shape
    segment, place = _places(packed, rows)
    shape = len(packed.cu_seqlens_q) - 1, num_heads, packed.max_seqlen_q
    padded = softmax_lse.new_full(shape, torch.inf)
    padded[segment, :, place] = softmax_lse.transpose(0, 1)
    return padded


def _places(packed: Packed, rows: int) -> tuple[Tensor, Tensor]:
    """Per row the number of its segment and its place in there; the device is not waited for."""
    starts = packed.cu_seqlens_q.long()
    segment = torch.repeat_interleave(starts.diff(), output_size=rows)
    return segment, torch.arange(rows, device=starts.device) - starts[segment]
