"""Which tensors the ops take: plain ones, outside the transforms that the ops do not know.

A subclass or a transform that an op does not know would fail deep inside torch in words about
dispatch keys, or, as forward-mode derivatives, give zeros without a word.
"""

from __future__ import annotations

import sys
import warnings
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd import forward_ad

MOST_HEADS = 512
"""More query heads than any published model has in one attention layer."""


def check_taken(name: str, x: Tensor) -> None:
    """Refuse nested and distributed tensors, and derivatives that the ops do not have.

    Raises:
        TypeError: a nested tensor, or a DTensor.
        NotImplementedError: x carries a forward-mode tangent, or is differentiated by torch.func.
    """
    if torch.compiler.is_compiling():
        return  # what is traced are plain tensors; the tracer looks at subclasses itself
    if x.is_nested:
        raise TypeError(
            f"{name} must be a plain tensor, got a nested one; give its packed rows, {name}.values("
            "), and its offsets() as cu_seqlens to wrap_ring_attn_varlen_func."
        )
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    if dtensor is not None and isinstance(x, dtensor):
        raise TypeError(
            f"{name} must be this rank's plain tensor, got a DTensor; give {name}.to_local(), "
            "sharded in its tokens over process_group, and wrap the result in DTensor.from_local "
            "where one is wanted."
        )
    _check_derivative(name, x)


def _check_derivative(name: str, x: Tensor) -> None:
    remedy = "use reverse mode, torch.autograd.grad or backward()"
    # Private, but there is no public question whether a dual level or a transform is open.
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError(
            f"{name} must not carry a forward-mode tangent (dual numbers, torch.func.jvp, jacfwd): "
            f"attention over ranks has no forward-mode derivative; {remedy}."
        )
    if not torch._C._functorch.is_functorch_wrapped_tensor(x):
        return
    keys = {level.key().name for level in torch._C._functorch.get_interpreter_stack() or ()}
    if keys & {"Grad", "Jvp"}:
        raise NotImplementedError(
            f"{name} must not be differentiated by torch.func (grad, vjp, jvp, jacrev, ...), which "
            f"the ops do not know; {remedy} on tensors that require a gradient."
        )


def warn_of_heads_first(q: Tensor) -> None:
    """Warn where q looks as if its heads came before its tokens, as in torch's own attention.

    Only where dim -2 has more than `MOST_HEADS` and more than dim -3, so that no model's shapes
    are suspected; short sequences are not noticed.
    """
    tokens, heads = q.shape[-3], q.shape[-2]
    if not torch.compiler.is_compiling() and heads > MOST_HEADS and heads > tokens:
        _warn_once(f"{list(q.shape)}", q.dim(), tokens, heads)


@lru_cache(maxsize=64)
def _warn_once(shape: str, dims: int, tokens: int, heads: int) -> None:
    """Once for every shape, as the same layer is called thousands of times."""
    packed = dims == 3
    form = "[tokens, num_heads, head_dim]" if packed else "[batch, tokens, num_heads, head_dim]"
    first, second = (0, 1) if packed else (1, 2)
    warnings.warn(
        f"q of shape {shape} is read as {form}: dim {first} as {tokens} tokens and dim {second} as "
        f"{heads} heads. If its heads come first, as in scaled_dot_product_attention, give "
        f"q.transpose({first}, {second}), k and v likewise.",
        stacklevel=2,
    )
