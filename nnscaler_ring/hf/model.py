"""`apply_ring_attention`: a transformers model that attends over a group of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from nnscaler_ring.core.exchange import EXCHANGES
from nnscaler_ring.core.ranks.groups import group_string
from nnscaler_ring.hf.attention_calls import attention_call
from nnscaler_ring.hf.attention_function import NAME
from nnscaler_ring.hf.cache import note_cache
from nnscaler_ring.hf.model_checks import check_model, chunk_size_of
from nnscaler_ring.hf.rope import LAST_POSITION, watch_rotary_modules
from nnscaler_ring.hf.sharding import SETTINGS, RingSettings, Sharding, transformers_model

if TYPE_CHECKING:
    from nnscaler_ring.core.ranks.groups import ProcessGroupLike

ModelT = TypeVar("ModelT", bound=nn.Module)

LAYOUTS = ("zigzag", "contiguous")
PACKED_LAYOUTS = ("contiguous", "folded")

WATCH = "nnscaler_ring_watch"
"""The attribute of a prepared model that holds its Watch."""


@dataclass(eq=False)
class Watch:
    """What was prepared, to be compared before every forward; and the hooks that do so."""

    attention: list[Any]
    rotary: list[nn.Module]
    handles: list[RemovableHandle]


def apply_ring_attention(
    model: ModelT,
    process_group: ProcessGroupLike | None = None,
    *,
    layout: str = "zigzag",
    packed_layout: str = "contiguous",
    exchange: str = "direct",
) -> ModelT:
    """Let a transformers model attend over a sequence that is spread over the ranks of a group.

    The model is changed in place: its attention implementation becomes "nnscaler_ring", and its
    attention modules remember the group. Its weights stay, and so does what it saves. Afterwards it
    takes batches that `shard_batch` has cut. Call it before or after the model is wrapped (peft,
    DDP, `fully_shard`, `torch.compile`), and again when layers were replaced.

    Args:
        model: a decoder with attention in every layer. Windows, sinks, softcap, MLA, chunks and
            layers of different kinds are computed; the checks name what is not.
        process_group: the ranks that share a sequence: None (this one alone), global ranks in
            block order, a ProcessGroup, or a one-dimensional DeviceMesh.
        layout: which rows of a sequence a rank holds: "zigzag" balances causal work, "contiguous"
            is one run of tokens.
        packed_layout: the same for packed batches: "contiguous", or "folded", which gives every
            rank as many tokens and as much causal work, for one packed sequence at a time.
        exchange: how keys travel; see `wrap_ring_attn_func`.

    Returns:
        the model.

    Raises:
        ValueError: the model would not compute what it computes on one device; the message names
            layers and remedies. Or a wrong argument.
        TypeError: not a transformers model.
    """
    _check_choice("layout", layout, LAYOUTS)
    _check_choice("packed_layout", packed_layout, PACKED_LAYOUTS)
    _check_choice("exchange", exchange, tuple(EXCHANGES))
    inner = transformers_model(model)
    attention = check_model(inner)
    settings = RingSettings(
        process_group=process_group,
        # Also makes a group that does not exist yet, before anything is compiled.
        group=group_string(process_group),
        layout=layout,
        packed_layout=packed_layout,
        exchange=exchange,
        chunk_size=chunk_size_of(inner),
    )
    inner.set_attn_implementation(NAME)
    modules: list[Any] = list(attention.values())
    for module in modules:
        setattr(module, SETTINGS, settings)
        if module.config._attn_implementation != NAME:  # of a layer from another model
            module.config._attn_implementation = NAME
    _watch(inner.base_model, modules)
    return model


def _watch(base: nn.Module, attention: list[Any]) -> None:
    """Compare the model with what was prepared before every forward."""
    before = getattr(base, WATCH, None)
    if before is not None:
        for handle in before.handles:
            handle.remove()
    rotary, handles = watch_rotary_modules(base)
    handles += [
        module.register_forward_pre_hook(note_cache, with_kwargs=True) for module in attention
    ]
    handles.append(base.register_forward_pre_hook(_before_forward, with_kwargs=True))
    setattr(base, WATCH, Watch(attention, rotary, handles))


def _before_forward(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a model that has changed; tell rotary modules how long the whole sequence is."""
    watch: Watch = getattr(base, WATCH)
    # While it compiles, the walk would become guards on every module of the model.
    if not torch.compiler.is_compiling():
        found = [module for module in base.modules() if attention_call(module) is not None]
        if len(found) != len(watch.attention) or any(
            one is not other for one, other in zip(found, watch.attention, strict=True)
        ):
            raise ValueError(
                "attention layers must stay those that apply_ring_attention found, "
                f"{len(watch.attention)} of them, got {len(found)}, others among them; call "
                "apply_ring_attention(model, ...) again."
            )
    for module in watch.attention:
        config = module.config
        if config._attn_implementation != NAME:
            raise ValueError(
                f"attn_implementation must stay {NAME!r}, got {config._attn_implementation!r}: "
                "each rank would attend to its own shard alone; call "
                "apply_ring_attention(model, ...) again, or use another model."
            )
    config = base.config
    for option in ("output_router_logits", "output_attentions"):
        if getattr(config, option, False) or kwargs.get(option):
            raise ValueError(
                f"{option} must be False for a model that attends over sharded sequences, got True."
            )
    sharding = kwargs.get("ring_sharding")
    for rotary in watch.rotary:
        last = sharding.last_position if isinstance(sharding, Sharding) else None
        setattr(rotary, LAST_POSITION, last)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}.")
