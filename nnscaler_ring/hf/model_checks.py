"""Which models give the same result over sharded sequences, told before anything is computed.

Attention may be the only place where tokens meet, it must go through transformers' attention
interface, and everything it passes there must be known. What breaks one of these is refused by the
name of its layer. Models that pass and that nobody has compared yet are named in the log.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from nnscaler_ring.hf.attention_calls import attention_call, attention_modules

logger = logging.getLogger(__name__)

COMPARED = (
    *("deepseek_v3", "gemma2", "gemma3_text", "glm4_moe", "gpt2", "gpt_oss", "llama"),
    *("llama4_text", "mistral", "olmo3", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3"),
    *("apertus", "arcee", "bitnet", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "glm"),
    *("glm4", "gpt_bigcode", "gpt_neox", "granite", "granitemoe", "helium", "hunyuan_v1_dense"),
    *("hunyuan_v1_moe", "ministral", "mixtral", "olmo", "olmo2", "olmoe", "persimmon", "phi"),
    *("seed_oss", "starcoder2", "vaultgemma"),
)
"""The `model_type` of architectures that the tests compare with the unsharded model."""

LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")

KEYWORDS = (
    *("dropout", "scaling", "sliding_window", "softcap", "s_aux", "is_causal", "position_ids"),
    *("attention_mask", "cache_position", "output_attentions", "use_cache"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
)
"""What an attention module may pass by name; anything else could change its result."""

HEADS = ("ForCausalLM", "LMHeadModel", "ForTokenClassification")
"""Ends of the names of models whose head looks at one token at a time."""

MEETING_PLACES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase)
"""Modules in which neighbouring tokens meet."""


def check_model(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The attention modules of a model, by name, if all of it is right over sharded sequences.

    Raises:
        ValueError: with everything that is not, and what to do.
    """
    base = model.base_model
    found = attention_modules(base)
    problems = [
        *_of_the_whole(model, base),
        *_of_layers(model, base, found),
        *_of_calls(model, found),
    ]
    if problems:
        raise ValueError(
            f"{type(model).__name__} cannot attend over sharded sequences:\n"
            + "\n".join(f"- {problem}" for problem in problems)
        )
    if model.config.model_type not in COMPARED:
        logger.warning(
            "%s (model_type %r) passes the checks, but its sharded results have not been compared "
            "with the unsharded model's in the tests of nnscaler_ring; compare them once.",
            type(model).__name__,
            model.config.model_type,
        )
    return found


def _of_the_whole(model: PreTrainedModel, base: nn.Module) -> Iterable[str]:
    config = model.config
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False) or getattr(
        config, "add_cross_attention", False
    ):
        yield "cross attention: keys come from another sequence; use a decoder without an encoder"
    if config.get_text_config() is not config:
        yield (
            f"{name} has parts for images or sound: their tokens see each other in blocks; load "
            "the text model alone (AutoModelForCausalLM of its text_config)"
        )
    elif base is not model and not name.endswith(HEADS):
        yield (
            f"the head of {name} may read tokens that another rank holds; use a model for causal "
            f"language modelling (a name that ends in one of {', '.join(HEADS)})"
        )
    parameters = inspect.signature(inspect.unwrap(type(base).forward)).parameters
    if "position_ids" not in parameters:
        yield f"{type(base).__name__}.forward takes no position_ids; every shard would begin at 0"
    if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        yield f"{type(base).__name__}.forward takes no **kwargs; the sharding cannot arrive"
    if getattr(config, "output_attentions", False):
        yield "config.output_attentions is True: the probabilities are never built; set it to False"
    if getattr(config, "output_router_logits", False):
        yield (
            "config.output_router_logits is True: the router's auxiliary loss of a shard is no "
            "part of the whole sequence's; set it to False"
        )


def _of_layers(
    model: PreTrainedModel, base: nn.Module, found: dict[str, nn.Module]
) -> Iterable[str]:
    """Every layer must attend through the interface, and mix tokens nowhere else."""
    config = model.config
    types = getattr(config, "layer_types", None) or []
    for kind in sorted({*types} - {*LAYER_TYPES}):
        such = [n for n, other in enumerate(types) if other == kind]
        yield (
            f"layers {such} are {kind!r}: only {', '.join(LAYER_TYPES)} are supported; the state "
            "of other layers is not exchanged between ranks; use a model with attention in every "
            "layer"
        )
    layers = _decoder_layers(base, config)
    if layers is None:
        yield f"{type(base).__name__} has no list of config.num_hidden_layers layers"
        return
    without = [n for n, layer in enumerate(layers) if not attention_modules(layer)]
    if without:
        yield (
            f"layers {without} ({type(layers[without[0]]).__name__}) do not attend through "
            "transformers' attention interface; use a model with attention in every layer, or a "
            "transformers that has moved this model to the interface"
        )
    for name, module in base.named_modules():
        if isinstance(module, MEETING_PLACES) and not _sees_one_token(module):
            yield (
                f"{name} is a {type(module).__name__}: it mixes neighbouring tokens, some of "
                "which other ranks hold; use a model without it"
            )
            break
    bidirectional = sorted(
        name for name, module in found.items() if getattr(module, "is_causal", True) is False
    )
    if bidirectional or getattr(config, "is_causal", True) is False:
        what = bidirectional[0] if bidirectional else "config"
        yield f"{what} is not causal; bidirectional models are not supported"


def _of_calls(model: PreTrainedModel, found: dict[str, nn.Module]) -> Iterable[str]:
    """What attention modules pass, and what they must pass."""
    config = model.config
    types = getattr(config, "layer_types", None)
    for kind in sorted({type(module) for module in found.values()}, key=lambda k: k.__name__):
        names = [name for name, module in found.items() if type(module) is kind]
        call = attention_call(found[names[0]])
        assert call is not None, names
        what = f"{names[0]} ({kind.__name__})"
        if not call.passes_others:
            yield f"{what} passes no **kwargs to attention; the sharding cannot arrive"
        unknown = sorted(call.keywords - {*KEYWORDS})
        if unknown:
            yield (
                f"{what} passes {', '.join(unknown)} to attention, which cannot be computed over a "
                "sharded sequence; use a model without"
            )
        if "sliding_window" in call.keywords:
            continue
        indices = [getattr(found[name], "layer_idx", None) for name in names]
        sliding = (
            [
                n
                for n in indices
                if (n is not None and types[n] == "sliding_attention")
                or (n is None and "sliding_attention" in types)
            ]
            if types
            else []
        )
        if sliding or (not types and getattr(config, "sliding_window", None) is not None):
            yield (
                f"{what} has a window but passes no sliding_window to attention; the window would "
                "be lost; set config.sliding_window to None if full attention is meant"
            )


def chunk_size_of(model: PreTrainedModel) -> int | None:
    """Tokens in a chunk where some layers attend within chunks (Llama 4), else None."""
    types: Any = getattr(model.config, "layer_types", None) or []
    return int(model.config.attention_chunk_size) if "chunked_attention" in types else None


def _decoder_layers(base: nn.Module, config: Any) -> nn.ModuleList | None:
    count = config.get_text_config().num_hidden_layers
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    return None


def _sees_one_token(module: nn.Module) -> bool:
    size = getattr(module, "kernel_size", None)
    return size is not None and all(n == 1 for n in size)
