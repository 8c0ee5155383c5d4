"""Rotary embeddings that depend on the length of the sequence, with the length of the whole.

`longrope` and `dynamic` embeddings take other frequencies once a sequence is long: they look at the
largest position that they are given. Of a shard that is the largest of the shard, so that the ranks
of one sequence could use different frequencies. Here such a module sees one position more, the
largest of the whole sequence, and its result of that position is taken off again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

LENGTH_DEPENDENT = ("dynamic", "longrope")
LAST_POSITION = "nnscaler_ring_last_position"
"""The attribute of a rotary module that holds the largest position of the batch, or None."""


def watch_rotary_modules(base: nn.Module) -> tuple[list[nn.Module], list[RemovableHandle]]:
    """The rotary modules that depend on the length, with hooks that show them the whole length."""
    modules = [module for module in base.modules() if _depends_on_length(module)]
    handles: list[RemovableHandle] = []
    for module in modules:
        setattr(module, LAST_POSITION, None)
        handles.append(module.register_forward_pre_hook(_add_last_position, with_kwargs=True))
        handles.append(module.register_forward_hook(_take_off_last_position))
    return modules, handles


def _depends_on_length(module: nn.Module) -> bool:
    kind = getattr(module, "rope_type", None)
    kinds = kind.values() if isinstance(kind, dict) else [kind]
    return any(k in LENGTH_DEPENDENT for k in kinds)


def _add_last_position(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    last = getattr(module, LAST_POSITION)
    if last is None:
        return None
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": _with_last(kwargs["position_ids"], last)}
    return (args[0], _with_last(args[1], last), *args[2:]), kwargs


def _with_last(position_ids: Tensor, last: int) -> Tensor:
    return torch.cat([position_ids, torch.full_like(position_ids[..., :1], last)], dim=-1)


def _take_off_last_position(module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
    if getattr(module, LAST_POSITION) is None:
        return None
    if isinstance(result, Tensor):
        return result[:, :-1]
    return tuple(x[:, :-1] for x in result)
