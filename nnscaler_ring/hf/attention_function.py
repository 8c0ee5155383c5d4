"""The attention and the mask function that transformers calls by the name "nnscaler_ring".

transformers looks both up in a registry by the name in `config._attn_implementation`. They hold no
state: what they need of the model is an attribute of the attention module, and what they need of
the batch arrives as a keyword.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from nnscaler_ring.hf.cache import attend_to_layer, layer_of
from nnscaler_ring.hf.sharding import SETTINGS, RingSettings, Sharding
from nnscaler_ring.masks import Chunks
from nnscaler_ring.ring_attn import wrap_ring_attn_func
from nnscaler_ring.ring_attn_varlen import wrap_ring_attn_varlen_func
from nnscaler_ring.zigzag_attn import wrap_zigzag_attn_func

# transformers recognises other implementations by parts of the name ("flash", "sdpa", "flex") and
# takes a slash for a repository: a name has none of them.
NAME = "nnscaler_ring"

REFUSED = {
    "position_bias": "a bias between all pairs of positions",
    "indices": "a choice of keys per query",
    "block_indices": "a choice of key blocks per query",
    "block_table": "a paged cache",
}
"""What attention layers may pass and a sharded sequence cannot express."""


def register_attention() -> None:
    """Make both functions known to transformers; a second time changes nothing."""
    AttentionInterface.register(NAME, ring_attention)
    AttentionMaskInterface.register(NAME, ring_mask)


def ring_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    ring_sharding: Sharding | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over a sequence that is spread over the ranks of a group.

    The signature is transformers': the first five arguments by position, the rest by keyword, and
    among them everything that the caller of the model passed beside.

    Args:
        module: the attention module, prepared by `apply_ring_attention`.
        query: [batch, heads, tokens of this rank, head_dim], rotary embedding applied.
        key: [batch, kv_heads, tokens of this rank, head_dim]; value: likewise, with its own dim.
        attention_mask: refused; the mask function returns None.
        sliding_window: how many keys a query sees, its own among them.
        s_aux: [heads], the sinks: one more logit per head in the softmax's denominator.
        ring_sharding: how the batch is spread; `shard_batch` puts it beside the batch.

    Returns:
        out [batch, tokens of this rank, heads, value's dim], and None for the probabilities.
    """
    settings = _settings(module)
    _refuse(module, attention_mask, settings, others)
    layer = None if ring_sharding is not None else layer_of(module, key)
    if ring_sharding is None and layer is None:
        raise ValueError(
            f"{_name(module)} got a batch that is not sharded (no ring_sharding among the model's "
            "keywords); pass what nnscaler_ring.hf.shard_batch(model, batch) returns, all of it. "
            "To generate, pass cache=RingCache(model). If all was passed, this model drops "
            "keywords on the way to its layers, and cannot be used."
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal:
        raise NotImplementedError(
            f"{_name(module)} must be causal, got is_causal={causal!r}; bidirectional layers are "
            "not supported."
        )
    q, k, v = (x.transpose(1, 2) for x in _under_autocast(query, key, value))
    scores: dict[str, Any] = {
        "softmax_scale": scaling,
        "window_size": (-1, -1) if sliding_window is None else (sliding_window - 1, 0),
        "softcap": float(softcap or 0.0),
        "sinks": None if s_aux is None else s_aux.to(q.dtype),
    }
    chunked = _layer_type(module) == "chunked_attention"
    if ring_sharding is None:
        assert layer is not None
        chunk_size = settings.chunk_size if chunked else None
        return attend_to_layer(q, k, v, layer, settings, scores, chunk_size), None
    if q.shape[1] != k.shape[1]:
        raise NotImplementedError(
            f"{_name(module)} must have as many keys as queries, got {q.shape[1]} queries and "
            f"{k.shape[1]} keys: a cache beside a sharded batch, or cross attention; pass "
            "use_cache=False, or see nnscaler_ring.hf.RingCache."
        )
    if chunked:
        assert settings.chunk_size is not None
        del scores["window_size"]
        scores["mask"] = Chunks(settings.chunk_size)
    else:
        scores["causal"] = True
    options: dict[str, Any] = {
        **scores,
        "dropout_p": float(dropout),
        "process_group": settings.process_group,
        "exchange": settings.exchange,
        "shard_lens": ring_sharding.shard_lens,
    }
    if ring_sharding.cu_seqlens is not None:
        options["layout"] = ring_sharding.layout
        return _packed(q, k, v, ring_sharding.cu_seqlens, options), None
    if ring_sharding.layout == "zigzag":
        return wrap_zigzag_attn_func(q, k, v, layout="zigzag", **options), None  # type: ignore[return-value]
    return wrap_ring_attn_func(q, k, v, **options), None  # type: ignore[return-value]


def ring_mask(
    *args: Any, attention_mask: Tensor | None = None, use_vmap: bool = False, **others: Any
) -> None:
    """The mask of a layer: None, as attention knows it already; refuses what None would lose.

    transformers builds no mask at all for an implementation without a mask function, so that
    padding would be attended to without a word. The arguments differ between its versions: only
    those that are read here have names.
    """
    if use_vmap:
        raise NotImplementedError(
            "attention_mask must be causal, windows, chunks or packed documents, got a model that "
            "adds a mask function of its own (image tokens, a prefix); it is not supported."
        )
    if attention_mask is None:
        return
    if torch.compiler.is_compiling() or not bool(attention_mask.all()):
        raise ValueError(
            "attention_mask must not reach the attention layers with padding in it: pad on the "
            "right and call nnscaler_ring.hf.shard_batch(model, batch), which takes it off, or "
            "pack the batch (DataCollatorWithFlattening). Left padding cannot be expressed."
        )


def _packed(
    q: Tensor, k: Tensor, v: Tensor, documents: tuple[Tensor, ...], options: dict[str, Any]
) -> Tensor:
    """Attention within documents, row by row of the batch."""
    rows = [
        wrap_ring_attn_varlen_func(q[n], k[n], v[n], cu_seqlens, cu_seqlens, **options)
        for n, cu_seqlens in enumerate(documents)
    ]
    return torch.stack(rows)  # type: ignore[arg-type]


def _under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype: what torch's own attention does there.

    A model's norms may leave float32 queries and keys beside a bfloat16 value.
    """
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) for x in tensors)


def _settings(module: nn.Module) -> RingSettings:
    settings = getattr(module, SETTINGS, None)
    if not isinstance(settings, RingSettings):
        raise ValueError(
            f"{_name(module)} must be prepared, got attn_implementation={NAME!r} without it; call "
            "nnscaler_ring.hf.apply_ring_attention(model, process_group=...), again after layers "
            "were replaced or added."
        )
    return settings


def _refuse(
    module: nn.Module,
    attention_mask: Tensor | None,
    settings: RingSettings,
    others: dict[str, Any],
) -> None:
    """Everything beside a sharded batch that would be dropped without a word."""
    if attention_mask is not None:
        raise ValueError(
            f"{_name(module)} must get no attention_mask, got one of shape "
            f"{list(attention_mask.shape)}: masks of four dimensions are not supported; pad on the "
            "right and call shard_batch, or pack the batch."
        )
    for name, meaning in REFUSED.items():
        if others.get(name) is not None:
            raise NotImplementedError(
                f"{_name(module)} passes {name}, {meaning}: it cannot be computed over a sharded "
                "sequence; use a model without it."
            )
    if others.get("output_attentions"):
        raise ValueError(
            "output_attentions must be False, got True: the probabilities are never built."
        )
    if others.get("cu_seq_lens_q") is not None or others.get("cu_seq_lens_k") is not None:
        raise ValueError(
            "cu_seq_lens_q and cu_seq_lens_k must go into shard_batch, got them beside a batch "
            "that is sharded already; shard_batch returns a batch without them."
        )
    if "num_items" in others:
        raise ValueError(
            "num_items must not be passed to the model under this name; take it out of the batch "
            "(num_items = batch.pop('num_items')) and pass num_items_in_batch=num_items."
        )
    if others.get("shift_labels") is not None and others.get("num_items_in_batch") is None:
        raise ValueError(
            "num_items_in_batch must be passed where a sharded batch has labels, or the loss would "
            "be the mean of this rank's tokens alone; pass num_items_in_batch="
            "batch.pop('num_items'), or no labels."
        )


def _layer_type(module: nn.Module) -> str:
    """The name that the model's configuration has for this layer's kind of attention."""
    types = getattr(getattr(module, "config", None), "layer_types", None)
    index = getattr(module, "layer_idx", None)
    return types[index] if types is not None and index is not None else "full_attention"


def _name(module: nn.Module) -> str:
    return f"{type(module).__name__} (layer {getattr(module, 'layer_idx', '?')})"
