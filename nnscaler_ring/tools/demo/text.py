"""Real text that every machine with Python has: the standard library's sources and docs."""

from __future__ import annotations

import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

PIECES = 8
"""A sequence holds at least so many pieces of documents: one alone says little of the loss."""


@dataclass(frozen=True)
class Corpus:
    """Documents, each of at least two bytes, and where they are from."""

    source: str
    documents: tuple[bytes, ...]


@dataclass(frozen=True)
class Sample:
    """What one training step reads, over all ranks: pieces of documents one after another.

    `targets[t]` is the byte after `inputs[t]` in its document; piece n is tokens
    `[cu_seqlens[n], cu_seqlens[n + 1])`.
    """

    inputs: Tensor  # int64 [tokens]
    targets: Tensor  # int64 [tokens]
    cu_seqlens: Tensor  # int32 [pieces + 1]


def load_corpus(path: Path | None = None) -> Corpus:
    """The paragraphs of a file, or the files of Python's standard library.

    Raises:
        ValueError: no text there.
    """
    if path is not None:
        try:
            text = path.read_bytes().replace(b"\r\n", b"\n")
        except OSError as error:
            raise ValueError(f"text must be a readable file, got {path}: {error}.") from error
        paragraphs = [part + b"\n\n" for part in text.split(b"\n\n") if part.strip()]
        return _checked(str(path), paragraphs)
    folder = Path(sysconfig.get_paths()["stdlib"])
    # topics.py is the language reference, as `help("topics")` prints it.
    files = [*sorted(folder.glob("*.py")), *folder.glob("pydoc_data/topics.py")]
    return _checked(f"{len(files)} files of {folder}", [file.read_bytes() for file in files])


def _checked(source: str, parts: list[bytes]) -> Corpus:
    documents = tuple(part for part in parts if len(part) >= 2)
    if not documents:
        raise ValueError(f"text must hold at least two bytes, got none in {source}.")
    return Corpus(source, documents)


def check_length(corpus: Corpus, tokens: int) -> None:
    """Whether the text is long enough for sequences of so many tokens."""
    total = sum(map(len, corpus.documents))
    if total <= tokens:
        raise ValueError(
            f"text must be longer than a sequence of {tokens} tokens, got {total} bytes in "
            f"{corpus.source}; use a longer text or fewer tokens."
        )


def draw_sample(corpus: Corpus, tokens: int, *, seed: int, step: int) -> Sample:
    """Pieces of random documents one after another: the same for the same arguments."""
    pieces = _pieces(corpus, tokens, random.Random(f"{seed}/{step}"))
    lengths = [0, *(len(piece) - 1 for piece in pieces)]
    return Sample(
        inputs=torch.tensor([byte for piece in pieces for byte in piece[:-1]]),
        targets=torch.tensor([byte for piece in pieces for byte in piece[1:]]),
        cu_seqlens=torch.tensor(lengths).cumsum(0).to(torch.int32),
    )


def _pieces(corpus: Corpus, tokens: int, rng: random.Random) -> list[bytes]:
    """Pieces of random documents with `tokens` pairs of neighbouring bytes in all."""
    longest = max(1, tokens // PIECES)
    pieces: list[bytes] = []
    missing = tokens
    while missing:
        document = rng.choice(corpus.documents)
        start = rng.randrange(max(1, len(document) - longest))
        pieces.append(document[start : start + min(longest, missing) + 1])
        missing -= len(pieces[-1]) - 1
    return pieces
