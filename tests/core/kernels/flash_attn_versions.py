"""The functions of each supported version of flash-attn, as they are called and as they answer.

Parameters as in the packages' interfaces at the tags v2.5.6 to v2.8.3 (`flash_attn/` and, for
flash-attn 3, `hopper/`), fa4-v4.0.0.beta14 and beta20, and of the branch main in November 2026.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnscaler_ring.core.kernels.flash_attn import Functions
from tests.core.kernels.stand_ins import Form, flash_backward, flash_forward

QKV = "q, k, v"
PACKED = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
GRADIENT = "dout, q, k, v, out, softmax_lse, dq, dk, dv"
WINDOW = "window_size_left, window_size_right"

OLD = {
    "forward": f"{QKV}, dropout_p, softmax_scale, causal, window_size, alibi_slopes, "
    "return_softmax",
    "packed_forward": f"{QKV}, {PACKED}, dropout_p, softmax_scale, causal, window_size, "
    "alibi_slopes, return_softmax",
    "backward": f"{GRADIENT}, dropout_p, softmax_scale, causal, window_size, alibi_slopes, "
    "deterministic, rng_state=None",
    "packed_backward": f"{GRADIENT}, {PACKED}, dropout_p, softmax_scale, causal, window_size, "
    "alibi_slopes, deterministic, rng_state=None",
}
WITH_SOFTCAP = {
    "forward": f"{QKV}, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, "
    "return_softmax",
    "packed_forward": f"{QKV}, {PACKED}, dropout_p, softmax_scale, causal, window_size=(-1, -1), "
    "softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None, "
    "seqused_k=None",
    "backward": f"{GRADIENT}, dropout_p, softmax_scale, causal, window_size, softcap, "
    "alibi_slopes, deterministic, rng_state=None",
    "packed_backward": f"{GRADIENT}, {PACKED}, dropout_p, softmax_scale, causal, window_size, "
    "softcap, alibi_slopes, deterministic, rng_state=None",
}
CUSTOM_OPS = {
    "forward": f"{QKV}, dropout_p, softmax_scale, causal, {WINDOW}, softcap, alibi_slopes, "
    "return_softmax",
    "packed_forward": f"{QKV}, {PACKED}, dropout_p, softmax_scale, causal, window_size_left=-1, "
    "window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, "
    "block_table=None, leftpad_k=None, seqused_k=None",
    "backward": f"{GRADIENT}, dropout_p, softmax_scale, causal, {WINDOW}, softcap, alibi_slopes, "
    "deterministic, rng_state=None",
    "packed_backward": f"{GRADIENT}, {PACKED}, dropout_p, softmax_scale, causal, {WINDOW}, "
    "softcap, alibi_slopes, deterministic, rng_state=None",
}
WITH_ZERO_TENSORS = CUSTOM_OPS | {
    name: f"{CUSTOM_OPS[name]}, zero_tensors=False"
    for name in ("packed_forward", "packed_backward")
}

THREE = {
    "forward": f"{QKV}, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, "
    "seqused_q, seqused_k, max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, "
    "rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale, softmax_scale, "
    "causal, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True, "
    "scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0",
    "backward": "dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, "
    "max_seqlen_q, max_seqlen_k, dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), "
    "softcap=0.0, deterministic=False, sm_margin=0",
}
THREE_HEAD = {
    "forward": f"{QKV}, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, "
    "cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, "
    "max_seqlen_k=None, page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None, "
    "rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None, v_descale=None, "
    "softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, "
    "attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, "
    "num_splits=1, pack_gqa=None, sm_margin=0",
    "backward": "dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, "
    "sequed_q=None, sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, "
    "dv=None, softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1, "
    "softcap=0.0, deterministic=False, sm_margin=0",
}

FOUR_FORWARD = (
    f"{QKV}, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, "
    "max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, page_table=None, "
    "softmax_scale=None, causal=False, softcap=None, window_size_left=None, "
    "window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None, "
    "intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, "
    "score_mod=None, mask_mod=None, block_sparse_tensors=None, return_lse=False, out=None, "
    "lse=None, aux_tensors=None, {}q_descale=None, k_descale=None, v_descale=None, "
    "gather_kv_indices=None"
)
FOUR_BACKWARD = (
    "q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, "
    "window_size_left=None, window_size_right=None, m_block_size=64, n_block_size=128, "
    "num_threads=256, pack_gqa=False, num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False, "
    "dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2, AtomLayoutMdQ=2, "
    "V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, "
    "max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, "
    "score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None, "
    "{}block_sparse_tensors=None, dlse=None"
)
FOUR_14 = {"forward": FOUR_FORWARD.format(""), "backward": FOUR_BACKWARD.format("")}
FOUR_20 = {
    "forward": FOUR_FORWARD.format("aux_scalars=None, "),
    "backward": FOUR_BACKWARD.format("aux_scalars=None, "),
}
FOUR_36 = {
    "forward": FOUR_20["forward"]
    + ", scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False",
    "backward": FOUR_20["backward"] + ", learnable_sink=None",
}


@dataclass(frozen=True)
class Version:
    """One version: whose kernel it is, its parameters, what it returns, how it computes.

    `results`: how many tensors the forward returns. `returns_gradients`: the backward returns them,
    beside writing them. `custom_ops`: the functions hide their signature behind a torch op.
    """

    kernel: str
    parameters: dict[str, str]
    form: Form
    results: int
    returns_gradients: bool
    custom_ops: bool = False


TWO = Form()
TWO_5 = Form(padded_packed_lse=True)
LATER = Form(blind_lse=-torch.inf, window_is_clamped=False)

VERSIONS = {
    "2.5.6": Version("flash_attn", OLD, TWO_5, 8, True),
    "2.5.9": Version(
        "flash_attn",
        OLD | {"packed_forward": OLD["packed_forward"] + ", block_table"},
        TWO_5,
        8,
        True,
    ),
    "2.6.3": Version("flash_attn", WITH_SOFTCAP, TWO, 8, True),
    "2.7.0": Version("flash_attn", CUSTOM_OPS, TWO, 4, False, custom_ops=True),
    "2.7.4": Version("flash_attn", WITH_ZERO_TENSORS, TWO, 4, False, custom_ops=True),
    "2.8.3": Version("flash_attn", WITH_ZERO_TENSORS, TWO, 4, False, custom_ops=True),
    "3 of 2.8.3": Version("flash_attn_3", THREE, LATER, 4, True),
    "3 of main": Version("flash_attn_3", THREE_HEAD, LATER, 4, False, custom_ops=True),
    "4.0.0b14": Version("flash_attn_4", FOUR_14, LATER, 2, True),
    "4.0.0b20": Version("flash_attn_4", FOUR_20, LATER, 4, True),
    "4.0.0b36": Version("flash_attn_4", FOUR_36, LATER, 5, True),
}


class CustomOp:
    """As torch's CustomOpDef: takes anything, and knows the function that it was made from."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._init_fn = function
        self._name = function.__name__

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._init_fn(*args, **options)


class Recorder:
    """A version's functions, computed densely; `calls` are what each was given, by name."""

    def __init__(self, version: Version) -> None:
        self.version = version
        self.calls: list[tuple[str, dict[str, Any]]] = []
        functions = {name: self._function(name) for name in version.parameters}
        packed = {
            name: functions.get(f"packed_{name}", functions[name])
            for name in ("forward", "backward")
        }
        self.functions = Functions(
            functions["forward"],
            packed["forward"],
            functions["backward"],
            packed["backward"],
            None if version.kernel == "flash_attn_4" else -1,
        )

    def _function(self, name: str) -> Callable[..., Any]:
        parameters = self.version.parameters[name]
        namespace: dict[str, Any] = {"record": self._record}
        exec(f"def {name}({parameters}):\n    return record({name!r}, dict(locals()))", namespace)
        function = namespace[name]
        return CustomOp(function) if self.version.custom_ops else function

    def _record(self, name: str, given: dict[str, Any]) -> Any:
        self.calls.append((name, given))
        for nothing in ("alibi_slopes", "block_table", "page_table", "k_new", "seqused_k", "dlse"):
            assert given.get(nothing) is None, (nothing, given[nothing])
        assert given.get("dropout_p", 0.0) == 0.0
        return (self._backward if "backward" in name else self._forward)(given)

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        causal = given.get("causal", given.get("is_causal"))
        if "window_size" in given:
            window = given["window_size"]
        else:
            window = given["window_size_left"], given["window_size_right"]
        unbounded = None if self.version.kernel == "flash_attn_4" else -1
        assert all(edge == unbounded or edge >= 0 for edge in window), window
        assert isinstance(causal, bool) and isinstance(given["softmax_scale"], float)
        return {
            "cu_q": given.get("cu_seqlens_q"),
            "cu_k": given.get("cu_seqlens_k"),
            "longest": (given.get("max_seqlen_q"), given.get("max_seqlen_k")),
            "scale": given["softmax_scale"],
            "causal": causal,
            "window": window,
            "softcap": given.get("softcap") or 0.0,
            "form": self.version.form,
        }

    def _forward(self, given: dict[str, Any]) -> tuple[Tensor | None, ...]:
        q, k, v = (given[name] for name in ("q", "k", "v"))
        out, lse = flash_forward(q, k, v, **self._options(given))
        if not given.get("return_lse", True):
            lse = None
        if self.version.results == 8:
            return out, q, k, v, out, lse, None, None
        return out, lse, *[None] * (self.version.results - 2)

    def _backward(self, given: dict[str, Any]) -> Any:
        tensors = [given[name] for name in ("dout", "q", "k", "v", "out")]
        lse = given.get("softmax_lse", given.get("lse"))
        gradients = flash_backward(*tensors, lse, **self._options(given))
        for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
            assert given[name].is_contiguous()
            given[name].copy_(gradient)
        delta = torch.zeros(())
        return (*gradients, delta) if self.version.returns_gradients else delta
