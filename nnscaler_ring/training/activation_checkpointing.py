"""Activation checkpointing that repeats no communication."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from nnscaler_ring.training.tensor_ranks import COLLECTIVES

SAVED = (torch.ops.nnscaler_ring.dilated_attention.default, *COLLECTIVES)
"""What is kept for the backward pass: attention's out and softmax_lse, and sums over ranks."""


def checkpointed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """`function(*args)`, of which only the arguments and the results of `SAVED` are kept."""
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    out: Tensor = checkpoint(function, *args, use_reentrant=False, context_fn=contexts)
    return out


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in SAVED else CheckpointPolicy.PREFER_RECOMPUTE
