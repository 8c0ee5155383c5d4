"""`RingTransformer`: a language model of dilated attention, whose sequence ranks may share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nnscaler_ring.core.ranks.groups import find_place, group_string
from nnscaler_ring.core.ranks.kept_group import kept_group
from nnscaler_ring.dilated.ring_multihead_dilated_attention import RingMultiheadDilatedAttention
from nnscaler_ring.training.shards import positions_of_shard

if TYPE_CHECKING:
    from nnscaler_ring.core.ranks.groups import ProcessGroupLike

NO_LABEL = -100
"""The label of the last token of the sequence, which has no next one."""


class RingTransformerLayer(nn.Module):
    """Dilated attention and a GELU network, each added to its input and normalised after it.

    Args:
        embed_dim, num_heads, segment_lengths, dilation_rates: see
            `RingMultiheadDilatedAttention`, which also takes the other arguments.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        **attention: Any,
    ) -> None:
        super().__init__()
        self.attention = RingMultiheadDilatedAttention(
            embed_dim, num_heads, segment_lengths, dilation_rates, **attention
        )
        self.ffn = nn.Sequential(
            nn.Linear(embed_dim, 4 * embed_dim), nn.GELU(), nn.Linear(4 * embed_dim, embed_dim)
        )
        self.norm1 = nn.LayerNorm(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)

    def forward(
        self, x: Tensor, is_causal: bool = True, *, shard_lens: Sequence[int] | None = None
    ) -> Tensor:
        """x [batch, tokens, embed_dim] of this rank -> the same shape."""
        out, _ = self.attention(x, x, x, is_causal=is_causal, shard_lens=shard_lens)
        x = self.norm1(x + out)
        return self.norm2(x + self.ffn(x))


class RingTransformer(nn.Module):
    """Takes token ids and returns logits of each next token; positions are learned and global.

    Args:
        max_seq_len: the most tokens of a whole sequence.
        segment_lengths, dilation_rates: of every layer.
        process_group: None, or the ranks that share the sequence, in block order.
        attention: further arguments of `RingMultiheadDilatedAttention`.
    """

    process_group = kept_group()

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        num_heads: int,
        num_layers: int,
        max_seq_len: int,
        *,
        segment_lengths: Sequence[int] = (4096, 8192, 16384),
        dilation_rates: Sequence[int] = (1, 2, 4),
        process_group: ProcessGroupLike | None = None,
        **attention: Any,
    ) -> None:
        super().__init__()
        self.process_group, self.max_seq_len = process_group, max_seq_len
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.pos_embedding = nn.Embedding(max_seq_len, embed_dim)
        self.layers = nn.ModuleList(
            RingTransformerLayer(
                embed_dim,
                num_heads,
                segment_lengths,
                dilation_rates,
                process_group=process_group,
                **attention,
            )
            for _ in range(num_layers)
        )
        self.output_norm = nn.LayerNorm(embed_dim)
        self.lm_head = nn.Linear(embed_dim, vocab_size)

    def forward(self, input_ids: Tensor, shard_lens: Sequence[int] | None = None) -> Tensor:
        """Logits [batch, tokens, vocab_size] of this rank's tokens.

        Args:
            input_ids: int64 [batch, tokens], this rank's contiguous shard.
            shard_lens: tokens of every block, in block order, where they differ.

        Raises:
            ValueError: the whole sequence is longer than max_seq_len.
        """
        tokens = input_ids.shape[1]
        ranks = find_place(group_string(self.process_group)).world_size
        total = sum(shard_lens) if shard_lens is not None else tokens * ranks
        if total > self.max_seq_len:
            raise ValueError(
                f"input_ids of all ranks must be at most max_seq_len={self.max_seq_len} tokens, "
                f"got {total}."
            )
        positions = positions_of_shard(
            tokens, self.process_group, shard_lens=shard_lens, device=input_ids.device
        )
        x = self.embedding(input_ids) + self.pos_embedding(positions)
        for layer in self.layers:
            x = layer(x, is_causal=True, shard_lens=shard_lens)
        logits: Tensor = self.lm_head(self.output_norm(x))
        return logits


def next_tokens(
    input_ids: Tensor,
    process_group: ProcessGroupLike | None = None,
    shard_lens: Sequence[int] | None = None,
) -> Tensor:
    """Find the token after each of this rank's; after its last comes the first of the next shard.

    Args:
        input_ids: int64 [batch, tokens], this rank's contiguous shard; it may be empty.

    Returns:
        The same shape; `NO_LABEL` at the end of the whole sequence.
    """
    place = find_place(group_string(process_group))
    batch, tokens = input_ids.shape
    following = input_ids.new_full((batch, 1), NO_LABEL)
    if place.group is not None:
        mine = input_ids[:, :1] if tokens else following
        firsts = [torch.empty_like(mine) for _ in place.members]
        dist.all_gather(firsts, mine.contiguous(), group=place.group)
        lens = shard_lens or [1] * place.world_size
        for block in range(place.block + 1, place.world_size):
            if lens[block]:
                following = firsts[place.members[block]]
                break
    return torch.cat([input_ids, following], dim=1)[:, 1:] if tokens else input_ids


def next_token_loss(logits: Tensor, labels: Tensor, predicted: int) -> Tensor:
    """This rank's part of the mean cross-entropy: the sum over ranks is that of all tokens.

    Args:
        labels: `next_tokens`.
        predicted: labels of all ranks that are not `NO_LABEL`, batch * (all tokens - 1).
    """
    total = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL, reduction="sum"
    )
    return total / predicted
