"""`RingDilatedAttention`: dilated attention of q, k, v whose sequence a ring of ranks shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nnscaler_ring.core.bounded_cache import BoundedCache
from nnscaler_ring.core.device import device_figures, free_bytes
from nnscaler_ring.core.exchange import EXCHANGES
from nnscaler_ring.core.kernels import KERNELS
from nnscaler_ring.core.op.attention import dilated_attention
from nnscaler_ring.core.op.checks import check_branches, check_head_offsets, check_qkv
from nnscaler_ring.core.plan.dilation import HeadOffsets
from nnscaler_ring.core.ranks.agreement import refusing_together
from nnscaler_ring.core.ranks.groups import Place, find_place, group_string, traffic
from nnscaler_ring.core.ranks.kept_group import kept_group
from nnscaler_ring.core.ranks.ring_size import check_ring_size
from nnscaler_ring.core.sizes import Sizes
from nnscaler_ring.dilated.arguments import refuse_unless, refuse_unless_none
from nnscaler_ring.dilated.limits import BufferLimits
from nnscaler_ring.dilated.memory import DilatedNeeds, DilatedShape, predict_needs
from nnscaler_ring.dilated_attn import wrap_dilated_attn_func
from nnscaler_ring.training.recovery import reserve_together

if TYPE_CHECKING:
    from nnscaler_ring.core.ranks.groups import ProcessGroupLike

CALLS_REMEMBERED = 20
"""Shapes of calls whose needs are kept, unless told otherwise."""


class RingDilatedAttention(nn.Module):
    """Dilated attention (LongNet) on [batch, tokens, heads, head_dim]; no parameters.

    Without a group the tensors are the whole sequence; with one, each rank's contiguous shard.
    Results are those of the same pattern on one device. docs/dilated.md says of every argument
    whether it is honoured, and why not.

    Args:
        segment_lengths: w of every branch, in tokens of the whole sequence.
        dilation_rates: r of every branch.
        dropout: must be 0.0.
        use_tf32: must be None: a setting of the process.
        block_size: must be None: decided by the exchange and the kernel.
        ring_size: with a group its size, or None. Without one the number of chunks that keys are
            computed in; None is 1.
        use_checkpointing: must be True: scores are never kept for the backward pass.
        device: where q, k and v must be; None: anywhere.
        dtype: what they must be; None: any that attention is computed in.
        head_offsets: "mod", "block" or a `HeadOffsets`.
        exchange, kernel: see `wrap_dilated_attn_func`.
        process_group: None, or the ranks that share the sequence, in block order.
        limits: the largest buffers that a call may need.
        cache_size: shapes of calls whose needs are remembered.
        enable_fault_tolerance: ranks agree before every forward pass that all have the memory for
            it, and free their caches and try once more where one has not; costs a sum of one number
            per rank. See Note [Why memory is reserved] in recovery.py.

    Raises:
        ValueError, NotImplementedError: an argument that cannot be honoured, by name.

    Source: Ding et al., "LongNet", arXiv 2307.02486.
    """

    process_group = kept_group()

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dropout: float = 0.0,
        use_tf32: bool | None = None,
        block_size: int | None = None,
        ring_size: int | None = None,
        use_checkpointing: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        head_offsets: str | HeadOffsets = "mod",
        exchange: str = "direct",
        kernel: str = "auto",
        process_group: ProcessGroupLike | None = None,
        limits: BufferLimits | None = None,
        cache_size: int = CALLS_REMEMBERED,
        enable_fault_tolerance: bool = False,
    ) -> None:
        super().__init__()
        check_branches(segment_lengths, dilation_rates)
        check_head_offsets(head_offsets, 0)
        if exchange not in EXCHANGES:
            raise ValueError(f"exchange must be one of {tuple(EXCHANGES)}, got {exchange!r}.")
        if kernel not in ("auto", *KERNELS):
            raise ValueError(f"kernel must be 'auto' or one of {KERNELS}, got {kernel!r}.")
        refuse_unless("dropout", dropout, 0.0)
        refuse_unless_none("use_tf32", use_tf32)
        refuse_unless_none("block_size", block_size)
        if not use_checkpointing:
            refuse_unless("use_checkpointing", use_checkpointing, True)
        self.segment_lengths, self.dilation_rates = tuple(segment_lengths), tuple(dilation_rates)
        self.ring_size = check_ring_size("ring_size", ring_size, process_group)
        self.device = None if device is None else torch.device(device)
        self.dtype = dtype
        self.head_offsets, self.exchange, self.kernel = head_offsets, exchange, kernel
        self.process_group = process_group
        self.limits = BufferLimits() if limits is None else limits
        self.enable_fault_tolerance = enable_fault_tolerance
        self._needs: BoundedCache[tuple[DilatedShape, DilatedNeeds]] = BoundedCache(cache_size)

    @property
    def chunks(self) -> int:
        """The number of parts that this device computes keys in."""
        return self.ring_size if self.process_group is None else 1

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        is_causal: bool = False,
        *,
        shard_lens: Sequence[int] | None = None,
    ) -> Tensor:
        """out [batch, tokens, num_heads, v_head_dim] of this rank's tokens.

        Args:
            q: [batch, tokens, num_heads, head_dim], this rank's.
            k, v: the same tokens, with num_kv_heads, which divides num_heads.
            is_causal: a query sees no later key.
            shard_lens: tokens of every block, in block order, where they differ.

        Raises:
            ValueError, TypeError: wrong arguments, here or on another rank, before data moves.
            BufferLimitError: the call needs a larger buffer than `limits` allow, on some rank.
            torch.OutOfMemoryError: with enable_fault_tolerance on every rank.
            RuntimeError: another rank is lost; within the group's timeout.
        """
        if not torch.compiler.is_compiling():
            self.prepare(q, k, v, is_causal, shard_lens)
        return self.compute(q, k, v, is_causal, shard_lens)

    def compute(
        self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, shard_lens: Sequence[int] | None
    ) -> Tensor:
        """Call the op, without this module's checks."""
        options: dict[str, Any] = {
            "causal": is_causal,
            "head_offsets": self.head_offsets,
            "process_group": self.process_group,
            "shard_lens": shard_lens,
            "exchange": self.exchange,
            "kernel": self.kernel,
        }
        out: Any
        if self.chunks > 1:
            out = dilated_attention(
                type(self).__name__,
                q,
                k,
                v,
                self.segment_lengths,
                self.dilation_rates,
                softmax_scale=None,
                return_lse=False,
                chunks=self.chunks,
                **options,
            )
        else:
            out = wrap_dilated_attn_func(
                q, k, v, self.segment_lengths, self.dilation_rates, **options
            )
        return out

    def prepare(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        is_causal: bool,
        shard_lens: Sequence[int] | None,
        *,
        device: torch.device | None = None,
    ) -> None:
        """Refuse what the ranks cannot do, on all of them, before anything is made or moved.

        Args:
            device: where q, k and v will be, if they are meta tensors because they are not yet.
        """
        group, op = group_string(self.process_group), type(self).__name__
        with refusing_together(group, op):
            check_qkv(q, k, v, packed=False)
            for name, x in (("q", q), ("k", k), ("v", v)):
                if device is None and self.device not in (None, x.device):
                    raise ValueError(f"{name} must be on {self.device}, got {x.device}; move it.")
                if self.dtype not in (None, x.dtype):
                    raise ValueError(f"{name} must be {self.dtype}, got {x.dtype}; convert it.")
            place = find_place(group)
            lens = tuple(shard_lens or [q.shape[1]] * place.world_size)
            if len(lens) != place.world_size or lens[place.block] != q.shape[1]:
                return  # the op refuses it, and says why
            needs = self._needs_of(q, k, v, is_causal, lens, place)
            elements = q.numel() + k.numel() + v.numel()
            self.limits.check_qkv(elements)
            self.limits.check_communication(needs.messages)
        if self.enable_fault_tolerance:
            made = elements * q.element_size() if device is None else 0
            size = needs.forward.total - made
            reserve_together(group, device or q.device, size, self.clear_cache, op)

    def get_memory_info(self) -> dict[str, Any]:
        """What this module holds and can hold, measured now; docs/dilated.md has the keys."""
        latest = self._needs.latest()
        how = EXCHANGES[self.exchange]
        return {
            "memory_complexity": "O(n)" if how.holds_all_keys else "O(n / ring_size)",
            "ring_size": self.ring_size,
            "max_sequence_length": self._longest_sequence(latest),
            "qkv_buffers_cached": len(self._needs),
            "call_bytes": latest[1].forward.components if latest else None,
            "sent_bytes": traffic(self.process_group).total_bytes,
            "optimizations_enabled": self._optimizations(),
            **device_figures(self._device()),
        }

    def clear_cache(self, force: bool = False) -> None:
        """Forget what calls need; with `force` the device's allocator gives back what is free."""
        self._needs.clear()
        if force and self._device().type == "cuda":
            torch.cuda.empty_cache()

    def _needs_of(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        is_causal: bool,
        lens: tuple[int, ...],
        place: Place,
    ) -> DilatedNeeds:
        sizes = Sizes(
            num_heads=q.shape[2],
            num_kv_heads=k.shape[2],
            head_dim=q.shape[3],
            v_head_dim=v.shape[3],
            dtype=str(q.dtype).removeprefix("torch."),
            batch=max(1, q.shape[0]),
        )
        shape = DilatedShape(
            self.segment_lengths,
            self.dilation_rates,
            is_causal,
            check_head_offsets(self.head_offsets, k.shape[2]),
            self.exchange,
            lens,
            sizes,
        )
        return self._needs.get(
            (shape, place.block), lambda: (shape, predict_needs(shape, place.block))
        )[1]

    def _longest_sequence(self, latest: tuple[DilatedShape, DilatedNeeds] | None) -> int | None:
        """Tokens whose training step fits what is free now, at the last call's bytes per token."""
        if latest is None or not latest[1].training.total:
            return None
        shape, needs = latest
        per_token = needs.training.total / max(shape.shard_lens)
        return int(free_bytes(self._device()) / per_token) * len(shape.shard_lens)

    def _optimizations(self) -> list[str]:
        enabled = ["scores are recomputed in the backward pass"]
        how = EXCHANGES[self.exchange]
        if self.process_group is not None and not how.sends_whole_shards:
            enabled.append("only used rows of K and V travel")
        if self.process_group is not None and not how.holds_all_keys:
            enabled.append("communication overlaps computation")
        if self.enable_fault_tolerance:
            enabled.append("memory is reserved on all ranks before data moves")
        return enabled

    def _device(self) -> torch.device:
        if self.device is not None:
            return self.device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def extra_repr(self) -> str:
        return (
            f"segment_lengths={list(self.segment_lengths)}, "
            f"dilation_rates={list(self.dilation_rates)}, ring_size={self.ring_size}"
        )
