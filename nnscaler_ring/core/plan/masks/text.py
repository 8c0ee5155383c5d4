"""Masks as text: the Python expression that makes one, read without running it.

A mask goes through torch.library ops, into what ranks compare, and into generated code as text.
"""

from __future__ import annotations

import ast
from functools import lru_cache

from nnscaler_ring.core.plan.masks.chunks import Chunks
from nnscaler_ring.core.plan.masks.combined import Both, Either
from nnscaler_ring.core.plan.masks.contract import Mask
from nnscaler_ring.core.plan.masks.documents import Documents
from nnscaler_ring.core.plan.masks.prefix import Prefix
from nnscaler_ring.core.plan.masks.rectangles import Rectangles
from nnscaler_ring.core.plan.masks.window import CAUSAL, FULL, Window

KINDS: dict[str, type[Mask]] = {
    "Window": Window,
    "Chunks": Chunks,
    "Prefix": Prefix,
    "Documents": Documents,
    "Rectangles": Rectangles,
    "Both": Both,
    "Either": Either,
}
"""Kinds of masks by name. A new one is one file and one line here."""

CONSTANTS: dict[str, Mask] = {"CAUSAL": CAUSAL, "FULL": FULL}


@lru_cache(maxsize=256)
def mask_of(text: str) -> Mask:
    """The mask that a text makes, such as "Chunks(8192)" or "CAUSAL & Window(left=5)".

    Raises:
        ValueError, TypeError: it makes none; with what is wrong.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(
            f"mask must be a mask or its text, such as {_such_as()}, got {text!r} ({error.msg})."
        ) from None
    found = _value(tree.body, text)
    if not isinstance(found, Mask):
        raise ValueError(f"mask must be a mask or its text, such as {_such_as()}, got {text!r}.")
    return found


def _value(node: ast.expr, text: str) -> object:
    match node:
        case ast.Name(id=name) if name in CONSTANTS:
            return CONSTANTS[name]
        case ast.BinOp(left=left, op=ast.BitAnd() | ast.BitOr(), right=right):
            first, second = _value(left, text), _value(right, text)
            if isinstance(first, Mask) and isinstance(second, Mask):
                return first & second if isinstance(node.op, ast.BitAnd) else first | second
        case ast.Call(func=ast.Name(id=name)) if name in KINDS:
            named = {word.arg: _value(word.value, text) for word in node.keywords if word.arg}
            return KINDS[name](*(_value(value, text) for value in node.args), **named)
        case _:
            try:
                return ast.literal_eval(node)
            except ValueError:
                pass
    raise ValueError(
        f"mask must be made of {(*KINDS, *CONSTANTS)} with plain numbers, such as {_such_as()}, "
        f"got {ast.unparse(node)!r} in {text!r}."
    )


def _such_as() -> str:
    return " or ".join(repr(kind.examples[0]) for kind in (Chunks, Both))
