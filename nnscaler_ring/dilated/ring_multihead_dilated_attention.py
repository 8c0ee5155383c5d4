"""`RingMultiheadDilatedAttention`: projections around dilated attention over a ring of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnscaler_ring.core.plan.dilation import HeadOffsets
from nnscaler_ring.core.ranks.agreement import refusing_together
from nnscaler_ring.core.ranks.groups import group_string
from nnscaler_ring.dilated.arguments import refuse_unless, refuse_unless_none
from nnscaler_ring.dilated.head_norm import HeadNorm
from nnscaler_ring.dilated.limits import BufferLimits
from nnscaler_ring.dilated.ring_dilated_attention import CALLS_REMEMBERED, RingDilatedAttention
from nnscaler_ring.training.activation_checkpointing import checkpointed
from nnscaler_ring.training.tensor_ranks import AllHeads, local_part

if TYPE_CHECKING:
    from nnscaler_ring.core.ranks.groups import ProcessGroupLike


class RingMultiheadDilatedAttention(nn.Module):
    """Multi-head dilated attention on [batch, tokens, embed_dim], called as nn.MultiheadAttention.

    One fused projection to q, k and v (its rows by KV head: the query heads of a group, then its
    key, then its value), dilated attention, MAGNETO's LayerNorm, and the output projection.
    Initialisation does not depend on the ranks. docs/dilated.md says of every argument whether it
    is honoured.

    Args:
        embed_dim: channels of the input and of the result.
        num_heads: query heads; divides embed_dim.
        segment_lengths, dilation_rates, dropout, use_tf32, block_size, ring_size: see
            `RingDilatedAttention`.
        bias: of the two projections.
        layer_norm: whether there is a LayerNorm before the output projection.
        gamma_init: gain of the Xavier initialisation of the value and output projections.
        use_checkpointing: keep only the input and attention's result for the backward pass; what
            is computed again takes no communication.
        use_flash_attention: None or True: a fused kernel, chosen by `kernel="auto"`, or an error
            where there is none; False: kernel "reference", which builds score matrices.
        compile_model: torch.compile the projections and the op, as one graph.
        device, dtype: of the parameters.
        num_kv_heads: key and value heads (GQA), divides num_heads; None: num_heads.
        head_offsets, exchange, kernel, process_group, limits, cache_size, enable_fault_tolerance:
            see `RingDilatedAttention`.

    Raises:
        ValueError, NotImplementedError: an argument that cannot be honoured, by name.

    Sources: Ding et al., "LongNet", arXiv 2307.02486; Wang et al., "Foundation Transformers"
    (MAGNETO), arXiv 2210.06423.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dropout: float = 0.0,
        bias: bool = True,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        block_size: int | None = None,
        ring_size: int | None = None,
        use_checkpointing: bool = True,
        use_tf32: bool | None = None,
        use_flash_attention: bool | None = None,
        compile_model: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        head_offsets: str = "mod",
        exchange: str = "direct",
        kernel: str = "auto",
        process_group: ProcessGroupLike | None = None,
        limits: BufferLimits | None = None,
        cache_size: int = CALLS_REMEMBERED,
        enable_fault_tolerance: bool = False,
        _ranks: AllHeads | None = None,
    ) -> None:
        super().__init__()
        ranks = AllHeads() if _ranks is None else _ranks
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_heads(embed_dim, num_heads, kv_heads, ranks.size)
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, kv_heads
        self.head_dim = embed_dim // num_heads
        self.use_checkpointing = use_checkpointing
        self._ranks = ranks
        self.attention = RingDilatedAttention(
            segment_lengths,
            dilation_rates,
            dropout=dropout,
            use_tf32=use_tf32,
            block_size=block_size,
            ring_size=ring_size,
            dtype=None,
            head_offsets=HeadOffsets(head_offsets, ranks.rank * (kv_heads // ranks.size), kv_heads),
            exchange=exchange,
            kernel=_kernel(kernel, use_flash_attention),
            process_group=process_group,
            limits=limits,
            cache_size=cache_size,
            enable_fault_tolerance=enable_fault_tolerance,
        )
        self._make_parameters(bias, gamma_init, device, dtype)
        self.norm = (
            HeadNorm(embed_dim, layer_norm_eps, ranks, device, dtype) if layer_norm else None
        )
        self._compiled = (
            torch.compile(self._compute, fullgraph=True) if compile_model else self._compute
        )

    @property
    def ring_size(self) -> int:
        """The ranks that share the sequence."""
        return self.attention.ring_size

    @property
    def process_group(self) -> ProcessGroupLike | None:
        """The ranks that share the sequence."""
        return self.attention.process_group

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: None = None,
        need_weights: bool = False,
        attn_mask: None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        shard_lens: Sequence[int] | None = None,
    ) -> tuple[Tensor, None]:
        """(output [batch, tokens, embed_dim] of this rank's tokens, None).

        Args:
            query: [batch, tokens, embed_dim], this rank's shard.
            key, value: None, which is query, or other channels of the same tokens.
            key_padding_mask, need_weights, attn_mask, average_attn_weights: only as they stand.
            is_causal: a token sees no later one.
            shard_lens: tokens of every block, in block order, where they differ.

        Raises:
            NotImplementedError: weights or a mask are asked for.
            ValueError, RuntimeError: as `RingDilatedAttention.forward`.
        """
        key = query if key is None else key
        value = key if value is None else value
        with refusing_together(group_string(self.process_group), type(self).__name__):
            refuse_unless("need_weights", need_weights, False)
            refuse_unless("average_attn_weights", average_attn_weights, True)
            refuse_unless_none("key_padding_mask", key_padding_mask)
            refuse_unless_none("attn_mask", attn_mask)
            for name, x in (("query", query), ("key", key), ("value", value)):
                self._check_input(name, x, query)
        if not torch.compiler.is_compiling():
            q, k, v = (self._heads_like(query, n) for n in self._local_heads())
            self.attention.prepare(q, k, v, is_causal, shard_lens, device=query.device)
        lens = None if shard_lens is None else list(shard_lens)
        inputs = query, key, value, is_causal, lens
        if self.use_checkpointing and torch.is_grad_enabled():
            return checkpointed(self._compiled, *inputs), None
        return self._compiled(*inputs), None

    def get_memory_info(self) -> dict[str, Any]:
        """Tells what `RingDilatedAttention` tells, and the bytes of this rank's parameters."""
        info = self.attention.get_memory_info()
        local = [local_part(p) for p in self.parameters()]
        info["parameter_bytes"] = sum(p.numel() * p.element_size() for p in local)
        if self.use_checkpointing:
            info["optimizations_enabled"].append("activations are recomputed, messages are not")
        return info

    def clear_cache(self, force: bool = False) -> None:
        """Does what `RingDilatedAttention.clear_cache` does."""
        self.attention.clear_cache(force)

    def _compute(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool,
        shard_lens: list[int] | None,
    ) -> Tensor:
        q, k, v = self._project(query, key, value)
        out = self.attention.compute(q, k, v, is_causal, shard_lens).flatten(2)
        if self.norm is not None:
            out = self.norm(out)
        out = self._ranks.total(F.linear(out, self._ranks.local(self.out_weight)))
        return (
            out if self.out_bias is None else out + self._ranks.local(self.out_bias).to(out.dtype)
        )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        queries = self.num_heads // self.num_kv_heads  # of each KV head
        weight = self._ranks.local(self.qkv_weight).unflatten(0, (-1, queries + 2, self.head_dim))
        bias = None
        if self.qkv_bias is not None:
            bias = self._ranks.local(self.qkv_bias).unflatten(0, (-1, queries + 2, self.head_dim))
        enter = self._ranks.enter
        if query is key and key is value:
            heads = _linear(enter(query), weight, bias)
            q, k, v = heads.split([queries, 1, 1], dim=3)
        else:
            edges = (0, queries, queries + 1, queries + 2)
            q, k, v = (
                _linear(
                    enter(x),
                    weight[:, edges[n] : edges[n + 1]],
                    None if bias is None else bias[:, edges[n] : edges[n + 1]],
                )
                for n, x in enumerate((query, key, value))
            )
        return q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3)

    def _make_parameters(
        self,
        bias: bool,
        gamma_init: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        def xavier(rows: int, gain: float) -> Tensor:
            weight = torch.empty(rows, self.embed_dim, device=device, dtype=dtype)
            return nn.init.xavier_normal_(weight, gain)

        kv_rows = self.num_kv_heads * self.head_dim
        parts = xavier(self.embed_dim, 1.0), xavier(kv_rows, 1.0), xavier(kv_rows, gamma_init)
        by_head = [x.view(self.num_kv_heads, -1, self.embed_dim) for x in parts]
        fused = torch.cat(by_head, dim=1).flatten(0, 1)
        share = self._ranks.share
        self.qkv_weight = share(nn.Parameter(fused), 0)
        self.out_weight = share(nn.Parameter(xavier(self.embed_dim, gamma_init)), 1)
        self.qkv_bias = self.out_bias = None
        if bias:
            zeros = torch.zeros(len(fused) + self.embed_dim, device=device, dtype=dtype)
            of_qkv, of_out = zeros.split([len(fused), self.embed_dim])
            self.qkv_bias = share(nn.Parameter(of_qkv.clone()), 0)
            self.out_bias = share(nn.Parameter(of_out.clone()), None)

    def _check_input(self, name: str, x: Tensor, query: Tensor) -> None:
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(
                f"{name} must be [batch, tokens, embed_dim={self.embed_dim}], batch first, got "
                f"{list(x.shape)}."
            )
        if x.shape != query.shape:
            raise ValueError(
                f"{name} must have query's tokens, {list(query.shape)}, got {list(x.shape)}: "
                "dilation goes by positions that queries and keys share."
            )

    def _local_heads(self) -> tuple[int, int, int]:
        kv_heads = self.num_kv_heads // self._ranks.size
        return self.num_heads // self._ranks.size, kv_heads, kv_heads

    def _heads_like(self, x: Tensor, heads: int) -> Tensor:
        """Stands for what a projection will give, without its values."""
        shape = (*x.shape[:2], heads, self.head_dim)
        return torch.empty(shape, device="meta", dtype=_linear_dtype(x))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [b, t, c] by weight [KV heads, heads of each, d, c] -> [b, t, KV heads, of each, d]."""
    rows = weight.flatten(0, 2)
    out = F.linear(x, rows, None if bias is None else bias.flatten())
    return out.unflatten(-1, weight.shape[:3])


def _linear_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a projection of x, also under autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _kernel(kernel: str, use_flash_attention: bool | None) -> str:
    if use_flash_attention is None:
        return kernel
    if kernel != "auto":
        raise ValueError(
            f"use_flash_attention must be None beside kernel={kernel!r}, got "
            f"{use_flash_attention}; one of the two chooses."
        )
    return "auto" if use_flash_attention else "reference"


def _check_heads(embed_dim: int, num_heads: int, num_kv_heads: int, tensor_ranks: int) -> None:
    if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
        raise ValueError(f"num_heads must divide embed_dim, {embed_dim}, got {num_heads}.")
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads, {num_heads}, got {num_kv_heads}.")
    if num_kv_heads % tensor_ranks:
        raise ValueError(
            f"num_kv_heads must be a multiple of the mesh's tensor dimension, {tensor_ranks}, got "
            f"{num_kv_heads}; every rank holds whole KV heads."
        )
