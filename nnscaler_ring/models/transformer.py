"""`Transformer`: a decoder-only language model whose sequence may be shared by any ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from nnscaler_ring.core.ranks.kept_group import kept_group
from nnscaler_ring.models.decoder_layer import DecoderLayer
from nnscaler_ring.models.rms_norm import RMSNorm
from nnscaler_ring.models.rope import rope_rotation
from nnscaler_ring.training.shards import positions_of_shard

if TYPE_CHECKING:
    from nnscaler_ring.core.ranks.groups import ProcessGroupLike


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes of a `Transformer`; its attention is `SelfAttention`."""

    vocab_size: int
    width: int = 256
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 32
    hidden: int = 768  # of SwiGLU
    rope_base: float = 10_000.0
    layout: str = "contiguous"
    balanced: bool | None = None
    window: int | None = None
    dropout_p: float = 0.0
    exchange: str = "direct"


class Transformer(nn.Module):
    """Takes token ids and returns logits of each next token: RoPE, RMSNorm, grouped heads, SwiGLU.

    The same weights give the same numbers on one device, under torchrun with the sequence sharded,
    and inside nnScaler's `parallelize()`, which needs `positions` as an input that it can shard.

    Args:
        config: the sizes.
        ring_size: see `SelfAttention`.
        process_group: None, or the ranks that share the sequence, in block order.

    Source: Touvron et al., "LLaMA", arXiv 2302.13971.
    """

    process_group = kept_group()

    def __init__(
        self,
        config: TransformerConfig,
        *,
        ring_size: int | None = None,
        process_group: ProcessGroupLike | None = None,
    ) -> None:
        super().__init__()
        self.config, self.process_group = config, process_group
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(
            DecoderLayer(
                config.width,
                config.hidden,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                layout=config.layout,
                balanced=config.balanced,
                window=config.window,
                dropout_p=config.dropout_p,
                exchange=config.exchange,
                ring_size=ring_size,
                process_group=process_group,
            )
            for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        shard_lens: Sequence[int] | None = None,
    ) -> Tensor:
        """Logits [batch, tokens, vocab_size] of the tokens that this rank holds.

        Args:
            ids: int64 [batch, tokens], this rank's tokens in the config's layout.
            positions: int64 [batch or 1, tokens], where they stand in the whole sequence. None:
                worked out from the group and `shard_lens`.
            shard_lens: tokens that each block holds, in block order, where they differ.
        """
        config = self.config
        if positions is None:
            positions = positions_of_shard(
                ids.shape[1],
                self.process_group,
                layout=config.layout,
                shard_lens=shard_lens,
                device=ids.device,
            )
        x = self.embedding(ids)
        rotation = rope_rotation(
            positions, config.head_dim, self.embedding.weight.dtype, config.rope_base
        )
        for layer in self.layers:
            x = layer(x, rotation, shard_lens)
        return self.head(self.norm(x))
