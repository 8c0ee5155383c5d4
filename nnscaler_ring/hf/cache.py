"""`RingCache`: the keys of a long prompt and of what is generated, spread over the ranks."""

from __future__ import annotations

import inspect
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from nnscaler_ring.core.ranks.groups import find_place
from nnscaler_ring.decode_attn import decode_attention
from nnscaler_ring.hf.batch import shard_batch
from nnscaler_ring.hf.sharding import RingSettings, Sharding, settings_of, transformers_model

CACHE = "nnscaler_ring_cache"
"""The attribute of an attention module that refers to the RingCache of its latest call."""


class RingCacheLayer(DynamicLayer):
    """One layer's keys and values, of the tokens that this rank holds."""

    def __init__(self, cache: RingCache) -> None:
        super().__init__()
        self.cache = weakref.proxy(cache)
        self.positions = torch.arange(0)
        self.total_tokens = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take new tokens in; returns what this rank holds.

        While a prompt is taken in, they are this rank's rows of it. Afterwards every rank has all
        of them, and token n stays on rank n modulo the number of ranks.
        """
        sharding: Sharding | None = self.cache.sharding
        if sharding is not None:
            positions = sharding.rows
            self.total_tokens += sharding.total_tokens
        else:
            count = key_states.shape[-2]
            new = torch.arange(self.total_tokens, self.total_tokens + count)
            mine = (new % self.cache.world_size == self.cache.block).nonzero().flatten()
            positions = new[mine]
            mine = mine.to(key_states.device)
            key_states, value_states = (
                x.index_select(-2, mine) for x in (key_states, value_states)
            )
            self.total_tokens += count
        self.positions = torch.cat([self.positions, positions])
        return super().update(key_states, value_states)

    def get_seq_length(self, *args: Any) -> int:
        """Tokens on all ranks together."""
        return self.total_tokens

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Of a mask over all tokens; transformers 4.57 passes positions instead of a length."""
        count = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.total_tokens + count, 0

    def crop(self, *args: Any) -> None:
        """Refused: assisted generation takes tokens back."""
        raise NotImplementedError(
            "RingCache cannot give tokens back; generate without an assistant model."
        )


class RingCache(Cache):
    """A cache for `generate()` of which a rank holds its share: the tokens over the ranks.

        cache = RingCache(model)
        cache.prefill(model, prompt_ids)
        tokens = model.generate(prompt_ids, cache=cache, max_new_tokens=64)

    All ranks of the group call it alike, with the same prompts; with sampling, after the same
    `torch.manual_seed`. Every rank then generates the same tokens, those of the unsharded model.
    With transformers before 5 the keyword is `past_key_values`.

    Args:
        model: prepared by `apply_ring_attention`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(layer_class_to_replicate=partial(RingCacheLayer, self))
        place = find_place(settings_of(model).group)
        self.world_size, self.block = place.world_size, place.block
        self.sharding: Sharding | None = None

    def prefill(self, model: nn.Module, prompt_ids: Tensor) -> None:
        """Take a prompt in, all but its last token, with which `generate()` begins.

        Every rank computes its own rows: nobody ever has all of the prompt's activations or keys.
        A short prompt needs no prefill, as `generate()` takes in on every rank what is missing.

        Args:
            prompt_ids: int64 [batch, tokens], the same on every rank, without padding.
        """
        if self.get_seq_length():
            raise ValueError(
                f"the cache must be empty, got {self.get_seq_length()} tokens; make a new one."
            )
        batch = shard_batch(model, {"input_ids": prompt_ids[:, :-1]})
        del batch["num_items"]
        names = inspect.signature(
            inspect.unwrap(type(transformers_model(model)).forward)
        ).parameters
        more: dict[str, Any] = {"cache" if "cache" in names else "past_key_values": self}
        if "logits_to_keep" in names:
            more["logits_to_keep"] = 1  # of this rank's rows: they are not used, and large
        self.sharding = batch["ring_sharding"]
        try:
            with torch.no_grad():
                model(**batch, **more, use_cache=True)
        finally:
            self.sharding = None


def note_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before an attention module is called: remember its RingCache for its attention function.

    The function gets keys that may be computed from what the cache returned, and not the cache.
    """
    caches = [x for x in (*args, *kwargs.values()) if isinstance(x, RingCache)]
    if caches or getattr(module, CACHE, None) is not None:
        # A reference that does not keep the cache's memory.
        setattr(module, CACHE, weakref.ref(caches[0]) if caches else None)


def layer_of(module: nn.Module, key: Tensor) -> RingCacheLayer | None:
    """The layer of a RingCache that an attention module's keys come from, or None."""
    reference = getattr(module, CACHE, None)
    cache = None if reference is None else reference()
    if cache is None:
        return None
    layer: RingCacheLayer = cache.layers[module.layer_idx]
    if len(layer.positions) != key.shape[2]:
        raise ValueError(
            f"{type(module).__name__} (layer {module.layer_idx}) must attend to the "
            f"{len(layer.positions)} tokens that this rank holds, got {key.shape[2]} keys: the "
            "model shares or changes its cache in a way that RingCache does not know."
        )
    return layer


def attend_to_layer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: RingCacheLayer,
    settings: RingSettings,
    scores: dict[str, Any],
    chunk_size: int | None,
) -> Tensor:
    """Attention of tokens that all ranks have over the keys of a layer, spread over the ranks.

    Args:
        q: [batch, t, heads, head_dim], of the last t tokens.
        k, v: [batch, tokens of this rank, kv_heads, dim], what the layer holds.
        scores: options of `decode_attention`.
        chunk_size: tokens of a chunk where the model attends within chunks, else None.

    Returns:
        out [batch, t, heads, v's dim].
    """
    positions = layer.positions
    if chunk_size is not None:
        if q.shape[1] != 1:
            raise NotImplementedError(
                "layers that attend within chunks take one token at a time from a RingCache, got "
                f"{q.shape[1]}; take the prompt in with cache.prefill(model, prompt_ids)."
            )
        chunk_start = (layer.total_tokens - 1) // chunk_size * chunk_size
        mine = (positions >= chunk_start).nonzero().flatten()
        positions = positions[mine]
        k, v = (x.index_select(1, mine.to(x.device)) for x in (k, v))
    out = decode_attention(
        q,
        k,
        v,
        torch.full((q.shape[0],), k.shape[1]),
        settings.process_group,
        key_positions=positions.expand(q.shape[0], -1),
        **scores,
    )
    assert isinstance(out, Tensor), out
    return out
