"""What train.yaml names: the model, which ends in its loss, and the text it learns."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from nnscaler_ring.models import Transformer, TransformerConfig

BYTES = 256


class LanguageModel(nn.Module):
    """Samples in, their mean loss in nats per byte out, as nnScaler's Trainer wants it."""

    def __init__(
        self, tokens: int, micro_batch_size: int, width: int = 64, layers: int = 2
    ) -> None:
        super().__init__()
        sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "hidden": 2 * width}
        self.model = Transformer(TransformerConfig(BYTES, width=width, num_layers=layers, **sizes))
        self.scale = 1 / (tokens * micro_batch_size)

    def forward(self, sample: dict[str, Tensor]) -> Tensor:
        logits = self.model(sample["ids"], sample["positions"])
        log_probabilities = nn.functional.log_softmax(logits, dim=-1)
        # One loss per token, then their sum: reduction="mean" would make nnScaler gather.
        losses = nn.functional.nll_loss(
            log_probabilities.transpose(1, 2), sample["labels"], reduction="none"
        )
        return losses.sum() * self.scale


class Pages(Dataset[dict[str, Tensor]]):
    """Pieces of the sources of Python's standard library, `tokens` bytes each, one after another.

    Args:
        tokens: bytes of a piece; its labels are the bytes one further on.
        files: names of files of the standard library.
        pieces: how many, from the start; None: all that there are.
    """

    def __init__(self, tokens: int, files: list[str], pieces: int | None = None) -> None:
        folder = Path(os.__file__).parent
        text = b"".join((folder / name).read_bytes() for name in files)
        self.data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.tokens = tokens
        self.pieces = (len(self.data) - 1) // tokens if pieces is None else pieces

    def __len__(self) -> int:
        return self.pieces

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.pieces:
            raise IndexError(f"index must be in 0..{self.pieces - 1}, got {index}.")
        start = index * self.tokens
        piece = self.data[start : start + self.tokens + 1]
        return {
            "ids": piece[:-1],
            "labels": piece[1:],
            "positions": torch.arange(self.tokens),
        }
