"""TransformerEngine's own context parallelism (`cp_comm_type="p2p"`) as a whole op.

Imported only by a call that asks for it. Through the public `DotProductAttention`, whose arguments
that are used here are the same from 2.2 to 2.18; it picks cuDNN or flash-attn itself.

Note [What TransformerEngine wants]
    Rank r holds chunks r and 2N-1-r of 2N, packed: of every document, one document after another.
    All chunks have one length. Dense (`bshd`): the lengths are taken from the tensors, and a
    `max_seqlen` that is passed would be multiplied by N again. Packed (`thd`): `cu_seqlens` and
    `max_seqlen` are those of the whole sequence, and `cu_seqlens_*_padded` must be the same object
    as `cu_seqlens_*`, or it believes that there is padding between the documents. Heads come back
    flattened into the channels.
"""

from __future__ import annotations

import importlib.metadata
import re
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler_ring.core.op.documents import Documents, cu_seqlens_of
from nnscaler_ring.core.plan.layout import SequenceLayout, Zigzag, ZigzagDocuments
from nnscaler_ring.core.plan.masks import CAUSAL, FULL
from nnscaler_ring.core.ranks.staging import backends_of

if TYPE_CHECKING:
    from nnscaler_ring.core.op.call import Call
    from nnscaler_ring.core.ranks.groups import Place

OLDEST = (2, 2)
DEVICE_TYPE, BACKEND = "cuda", "nccl"
DTYPES = (torch.bfloat16, torch.float16)
LARGEST_HEAD_DIM = 256


class TransformerEngine:
    """Zigzag and packed attention over NCCL, by TransformerEngine 2.2 or newer."""

    def supports(self, call: Call, place: Place) -> str | None:
        """Half precision on CUDA, causal or full, chunks of one length, none of the options."""
        asked = (
            lambda: _cannot_use(call),
            lambda: _cannot_reach(call, place),
            lambda: _cannot_mask(call),
            lambda: _cannot_do_option(call),
            lambda: _cannot_cut(call),
            _is_not_installed,
        )
        return next((reason for ask in asked if (reason := ask())), None)

    def layout(self, call: Call) -> SequenceLayout:
        """Zigzag, of the whole sequence or of every document."""
        ranks = len(call.shard_lens)
        if call.cu_seqlens_q is None:
            return Zigzag(sum(call.shard_lens), ranks)
        return ZigzagDocuments(cu_seqlens_of(call.cu_seqlens_q), ranks)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, call: Call, place: Place) -> Tensor:
        """One call of DotProductAttention: see Note [What TransformerEngine wants]."""
        group = place.group
        assert group is not None, place
        packed = call.cu_seqlens_q is not None
        padding = "padding_causal" if call.mask == CAUSAL.text else "padding"
        dense = "causal" if call.mask == CAUSAL.text else "no_mask"
        module = _attention_module(
            num_attention_heads=call.shape.num_heads,
            kv_channels=call.shape.head_dim,
            num_gqa_groups=call.shape.num_kv_heads,
            attention_dropout=0.0,
            qkv_format="thd" if packed else "bshd",
            attn_mask_type=padding if packed else dense,
            softmax_scale=call.softmax_scale,
        )
        module.set_context_parallel_group(
            group, dist.get_process_group_ranks(group), _stream(q.device), "p2p"
        )
        out: Tensor = module(*(x.contiguous() for x in (q, k, v)), **_documents(call, q.device))
        return out.view(q.shape)


def _is_not_installed() -> str | None:
    try:
        version = importlib.metadata.version("transformer_engine")
    except importlib.metadata.PackageNotFoundError:
        return "TransformerEngine is not installed: pip install 'transformer_engine[pytorch]>=2.2'"
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        return f"TransformerEngine must be 2.2 or newer, it is {version}"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a wheel without its CUDA part raises what it likes
        return f"TransformerEngine {version} cannot be imported: {error}"
    return None


def _cannot_use(call: Call) -> str | None:
    if call.shape.device_type != DEVICE_TYPE:
        return f"it computes on {DEVICE_TYPE}, the tensors are on {call.shape.device_type}"
    if call.shape.torch_dtype not in DTYPES:
        return f"it computes in {', '.join(map(str, DTYPES))}, not in {call.shape.torch_dtype}"
    if call.shape.head_dim % 8 or call.shape.head_dim > LARGEST_HEAD_DIM:
        return (
            f"head_dim must be a multiple of 8 and at most {LARGEST_HEAD_DIM}, it is "
            f"{call.shape.head_dim}"
        )
    if call.shape.v_head_dim != call.shape.head_dim:
        return f"v_head_dim must be head_dim, {call.shape.head_dim}, it is {call.shape.v_head_dim}"
    return None


def _cannot_reach(call: Call, place: Place) -> str | None:
    if place.group is None or place.world_size == 1:
        return "process_group must have at least 2 ranks"
    backend = backends_of(place.group).get(DEVICE_TYPE)
    if backend != BACKEND:
        return f"process_group must use {BACKEND} for {DEVICE_TYPE} tensors, it uses {backend}"
    if call.exchange != "ring":
        return f"exchange must be 'ring', which is how its keys travel, it is {call.exchange!r}"
    if place.members != tuple(range(place.world_size)):
        return (
            "the blocks must lie in the order of the group's ranks, they lie in the order "
            f"{list(place.members)}"
        )
    return None


def _cannot_mask(call: Call) -> str | None:
    if call.mask not in (CAUSAL.text, FULL.text):
        return (
            "window_size must be (-1, -1) and mask causal or full: its p2p exchange has no other "
            f"masks, the mask is {call.mask}"
        )
    if call.cu_seqlens_q is None and call.compute_layout != "zigzag":
        return "it computes in zigzag order: use wrap_zigzag_attn_func"
    if call.cu_seqlens_q != call.cu_seqlens_k or call.shard_lens != call.shard_lens_k:
        return "cu_seqlens_k and shard_lens_k must be those of q"
    return None


def _cannot_do_option(call: Call) -> str | None:
    if call.dropout_p:
        return "dropout_p must be 0: its masks would depend on the number of ranks"
    if call.deterministic:
        return "deterministic must be False: it takes that from the environment"
    if call.softmax_scale <= 0:
        return "softmax_scale must be above 0: its kernels find the largest score unscaled"
    others = {
        "softcap": call.softcap > 0,
        "alibi_slopes": call.alibi_slopes is not None,
        "bias": call.bias is not None,
        "sinks": call.sinks,
    }
    given = [name for name, is_given in others.items() if is_given]
    return f"it is not given {', '.join(given)} over several ranks" if given else None


def _cannot_cut(call: Call) -> str | None:
    chunks = 2 * len(call.shard_lens)
    total = sum(call.shard_lens)
    if call.cu_seqlens_q is None:
        return _uneven("the total of tokens", total, chunks)
    cu_seqlens = cu_seqlens_of(call.cu_seqlens_q)
    lengths = (
        _uneven(f"the length of document {n}", stop - start, chunks)
        for n, (start, stop) in enumerate(pairwise(cu_seqlens))
    )
    return next((reason for reason in lengths if reason), None)


def _uneven(what: str, tokens: int, chunks: int) -> str | None:
    if tokens and tokens % chunks == 0:
        return None
    return f"{what} must be a multiple of {chunks}, two chunks a rank, and not 0; it is {tokens}"


@lru_cache(maxsize=64)
def _attention_module(**settings: Any) -> Any:
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(**settings)


def _documents(call: Call, device: torch.device) -> dict[str, Any]:
    if call.cu_seqlens_q is None:
        return {}
    cu_seqlens = _on_device(call.cu_seqlens_q, device)
    longest = max(b - a for a, b in pairwise(cu_seqlens_of(call.cu_seqlens_q)))
    names = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")
    return {**dict.fromkeys(names, cu_seqlens), "max_seqlen_q": longest, "max_seqlen_kv": longest}


@lru_cache(maxsize=16)
def _on_device(documents: Documents, device: torch.device) -> Tensor:
    """int32, the same object in every layer of a model, so that the host waits for one copy."""
    return torch.tensor(cu_seqlens_of(documents), dtype=torch.int32, device=device)


@lru_cache(maxsize=16)
def _stream(device: torch.device) -> torch.cuda.Stream:
    """On which every second step is computed."""
    return torch.cuda.Stream(device)
