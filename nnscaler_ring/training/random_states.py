"""The random generators of a process: torch's, CUDA's, Python's, and numpy's where it is used."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from typing import Any

import torch


def random_states() -> dict[str, Any]:
    """Take the states of all generators of this process."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        states["numpy"] = numpy.random.get_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Go on where `random_states` stood; generators that this process has not are left out."""
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "python" in states:
        random.setstate(states["python"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    if "numpy" in states:
        import numpy

        numpy.random.set_state(states["numpy"])


def seed_apart(generator: str, encoded: Any, rank: int) -> None:
    """Begin a new stream on a rank that did not exist when states were saved, always the same one.

    Args:
        generator: a key of `random_states`.
        encoded: its saved state on some rank, as JSON has it.
    """
    text = json.dumps([encoded, rank], sort_keys=True).encode()
    seed = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")
    match generator:
        case "torch":
            torch.default_generator.manual_seed(seed)
        case "python":
            random.seed(seed)
        case "cuda" if torch.cuda.is_available():
            torch.cuda.manual_seed(seed)
        case "numpy":
            import numpy

            numpy.random.seed(seed % 2**32)
