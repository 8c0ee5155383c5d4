"""What a layer's forward passes take, for a log."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

logger = logging.getLogger(__name__)


class Monitor:
    """Logs every forward pass at a level, and to Weights & Biases where a run is under way there.

    Args:
        log_level: one of `LEVELS`.
        profile_memory: also the peak of device memory; needs CUDA.
    """

    def __init__(self, log_level: str, profile_memory: bool) -> None:
        if log_level not in LEVELS:
            raise ValueError(f"log_level must be one of {LEVELS}, got {log_level!r}.")
        if profile_memory and not torch.cuda.is_available():
            raise ValueError(
                "profile_memory must be False without CUDA, whose allocator does the counting; "
                "nnscaler_ring.tools.demo.memory.peak_memory measures on a CPU."
            )
        self.log_level, self.profile_memory = log_level, profile_memory
        self._steps = 0
        self._lock = threading.Lock()

    @contextmanager
    def forward(self, sent_bytes: Callable[[], int]) -> Iterator[None]:
        """Measure the passage inside: seconds of the host, and bytes sent."""
        before, start = sent_bytes(), time.perf_counter()
        if self.profile_memory:
            torch.cuda.reset_peak_memory_stats()
        yield
        figures: dict[str, Any] = {
            "forward_seconds": time.perf_counter() - start,
            "forward_sent_bytes": sent_bytes() - before,
        }
        if self.profile_memory:
            figures["forward_peak_bytes"] = torch.cuda.max_memory_allocated()
        with self._lock:
            self._steps += 1
            figures["forward_passes"] = self._steps
        logger.log(logging.getLevelName(self.log_level), "dilated attention: %s", figures)
        self._tell_wandb(figures)

    def _tell_wandb(self, figures: dict[str, Any]) -> None:
        # Only where the program itself has imported it and begun a run: nothing leaves by itself.
        wandb = sys.modules.get("wandb")
        if wandb is not None and getattr(wandb, "run", None) is not None:
            wandb.log({f"dilated_attention/{name}": value for name, value in figures.items()})

    # A lock cannot be copied or pickled.
    def __reduce__(self) -> tuple[type[Monitor], tuple[str, bool]]:
        return Monitor, (self.log_level, self.profile_memory)
