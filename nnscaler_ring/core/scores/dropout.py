"""Which probabilities attention dropout drops: a function of the seed and of global coordinates.

Note [The same mask everywhere]
    Nothing is drawn: whether (batch row, head, query token, key token) is dropped is a hash of
    these numbers and the seed. So the mask does not depend on the number of ranks, the layout, the
    exchange or the order of the tiles, and the backward pass computes it again. A word per query
    row and a word per key are made first; a pair mixes their sum, so that a block of pairs costs
    one round of mixing.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (counters instead of
state); Steele et al., "Fast splittable pseudorandom number generators", OOPSLA 2014 (the mixing).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nnscaler_ring.core.ranks.failure import DisagreementError
from nnscaler_ring.core.ranks.staging import device_of_numbers
from nnscaler_ring.core.ranks.transport import Transport


class DropoutSeed(NamedTuple):
    """A seed for ranks that hold a part of the batch or of the heads.

    Args:
        seed: int, the same on all ranks of `process_group`; None: drawn, as for dropout_seed=None.
        first_batch: this rank's first row of the whole batch.
        first_head: this rank's first query head of all heads.
    """

    seed: int | None = None
    first_batch: int = 0
    first_head: int = 0


class Dropout(NamedTuple):
    """Dropout of one call: `seed` is an int64 scalar tensor, the rest as in `DropoutSeed`."""

    probability: float
    seed: Tensor
    first_batch: int
    first_head: int

    def factors(
        self, batch: int, num_heads: int, q_tokens: Tensor, k_tokens: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """[batch, num_heads, nq, nk]: 0 for what is dropped, 1 / (1 - p) for what is kept."""
        device = q_tokens.device
        word = _mix(self.seed.to(device) + _GOLDEN)
        for first, count in ((self.first_batch, batch), (self.first_head, num_heads)):
            numbers = torch.arange(first + 1, first + count + 1, device=device)
            word = _mix(word.unsqueeze(-1) + numbers * _GOLDEN)
        of_query = _mix(word.unsqueeze(-1) + (q_tokens + 1) * _GOLDEN)
        of_key = _mix((k_tokens + 1) * _GOLDEN)
        word = _shifted(_mix(of_query.unsqueeze(-1) + of_key), 11)  # 53 bits, uniform
        kept = word >= int(self.probability * 2**53)
        return kept.to(dtype).div_(1.0 - self.probability)


def seed_tensor(probability: float, seed: int | None) -> Tensor | None:
    """The seed of one call, int64 on the CPU: drawn from torch's generator where none is given."""
    if not probability:
        return None
    if seed is None:
        return torch.randint(2**62, ())
    return torch.tensor(seed)


def agreed_seed(
    seed: Tensor | None, transport: Transport, device: torch.device, *, must_be_same: bool
) -> Tensor | None:
    """The seed of the first block's rank, on `device`, which every rank uses; None without dropout.

    Args:
        must_be_same: the caller gave the seed, so a difference is an error. In a group that serves
            GPUs alone the host waits for the comparison.

    Raises:
        ValueError: on all ranks alike, if seeds that must be the same differ.
    """
    if seed is None:
        return None
    if transport.place.group is None or transport.place.world_size == 1:
        return seed.to(device, non_blocking=True)
    mine = seed.reshape(1).to(device_of_numbers(transport.place.group, device), non_blocking=True)
    seeds = transport.all_gather("seed", mine).flatten()
    if must_be_same and bool((seeds != seeds[0]).any()):
        ranks = [transport.place.global_rank(block) for block in range(len(seeds))]
        raise DisagreementError(
            f"{transport.op}: dropout_seed must be the same on all ranks of process_group, got "
            f"{dict(zip(ranks, seeds.tolist(), strict=True))} by rank; pass the same int, or None "
            "to let the first rank draw it."
        )
    return seeds[0].to(device, non_blocking=True)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 64-bit words in which every bit depends on every bit."""
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits with zeros from the left: torch's shift of int64 repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
