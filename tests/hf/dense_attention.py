"""Dense float64 attention under the name "dense64", for unsharded models to be compared with.

Its masks are transformers' own. transformers' eager attention will not do: it takes its softmax in
float32, and gives NaN where a row sees no key.
"""

from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "dense64"


def register() -> None:
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def _attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor,
    dropout: float = 0.0,
    scaling: float = 1.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scaling
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    blind = ~attention_mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~attention_mask & ~blind, -torch.inf)
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = torch.softmax(scores, -1)[..., : k.shape[2]].masked_fill(blind, 0.0)
    return (weights @ v).transpose(1, 2).contiguous(), None


def _mask(**arguments: Any) -> Tensor:
    return sdpa_mask(**{**arguments, "allow_is_causal_skip": False})


def _lifted(x: Any) -> Any:
    return torch.float64 if x is torch.float32 else x


@contextmanager
def float64_throughout():
    """Casts to float32 that stand in the models go to float64: norms, routers, losses.

    So what is compared is attention and the sharding, not the rounding of these.
    """
    to, kind, softmax = Tensor.to, Tensor.type, nn.functional.softmax

    def lifted_to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return to(self, *map(_lifted, args), **{k: _lifted(v) for k, v in kwargs.items()})

    def lifted_type(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        return kind(self, *map(_lifted, args), **{k: _lifted(v) for k, v in kwargs.items()})

    def lifted_softmax(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return softmax(x, *args, **{k: _lifted(v) for k, v in kwargs.items()})

    with (
        patch.object(Tensor, "float", Tensor.double),
        patch.object(Tensor, "to", lifted_to),
        patch.object(Tensor, "type", lifted_type),
        patch.object(nn.functional, "softmax", lifted_softmax),
    ):
        yield
