"""What attention modules pass to transformers' attention interface, read from their source.

An attention function sees what arrives and never what does not: whether a window is passed, or
whether the keywords of a call reach it at all, stands in the source of the module's forward alone.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from torch import nn


@dataclass(frozen=True)
class AttentionCall:
    """One call of the attention interface: its keywords, and whether it passes `**kwargs` on."""

    keywords: frozenset[str]
    passes_others: bool


def attention_call(module: nn.Module) -> AttentionCall | None:
    """The call in a module's own forward, or None where there is none, or no source to read."""
    # mypy takes a class for hashable only where it cannot see it.
    return _call_in(cast(Any, type(module)))


def attention_modules(module: nn.Module) -> dict[str, nn.Module]:
    """The modules inside one, by name, that call the attention interface."""
    return {name: m for name, m in module.named_modules() if attention_call(m) is not None}


@lru_cache(maxsize=1024)
def _call_in(kind: Any) -> AttentionCall | None:
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward)))
    except (OSError, TypeError):
        return None
    for node in ast.walk(ast.parse(source)):
        # All of transformers calls it by this name, whatever it is bound to.
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "attention_interface"
        ):
            names = [keyword.arg for keyword in node.keywords]
            return AttentionCall(frozenset(n for n in names if n is not None), None in names)
    return None
