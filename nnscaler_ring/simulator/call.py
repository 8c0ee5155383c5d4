"""One attention call over simulated ranks: everything that its tiles, bytes and results follow."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from nnscaler_ring.core.exchange import EXCHANGES, USUAL, Cut, Program
from nnscaler_ring.core.op.checks import check_cu_seqlens_values, check_shard_lens
from nnscaler_ring.core.plan.layout import LAYOUTS, PackedDocuments, SequenceLayout
from nnscaler_ring.core.plan.schedule import CAUSAL, Mask, Rows, Schedule, Window
from nnscaler_ring.core.plan.span import even_lens
from nnscaler_ring.core.plan.tile import UNBOUNDED
from nnscaler_ring.core.sizes import Sizes
from nnscaler_ring.core.token_index import token_index


@dataclass(frozen=True)
class SimulatedCall:
    """One attention call over `ranks` simulated ranks; `wrap_*_attn_func` documents the rest.

    Args:
        tokens: of the whole sequence.
        sizes: heads, head dims, batch and dtype.
        mask: in tokens; `Window.from_window(causal, window_size)` takes the public arguments.
        q_layout: how queries are spread over the ranks: a name in `LAYOUTS`, or any layout.
        k_layout: likewise for keys and values; None: as the queries.
        exchange: a name in `EXCHANGES`.
        shard_lens: tokens of every contiguous shard; None: as equal as they can be.
        cu_seqlens: packed documents, the same for queries and keys; None: one document.
        softmax_scale: None: 1/sqrt(head_dim).

    Raises:
        ValueError: an argument that cannot be, with the rule and the remedy.
    """

    tokens: int
    ranks: int
    sizes: Sizes
    mask: Mask = CAUSAL
    q_layout: str | SequenceLayout = "contiguous"
    k_layout: str | SequenceLayout | None = None
    exchange: str = "direct"
    kernel: str = "auto"
    shard_lens: tuple[int, ...] | None = None
    cu_seqlens: tuple[int, ...] | None = None
    softmax_scale: float | None = None

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ValueError(f"ranks must be at least 1, got {self.ranks}.")
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}.")
        if self.exchange not in EXCHANGES:
            raise ValueError(f"exchange must be one of {(*EXCHANGES,)}, got {self.exchange!r}.")
        for name in (self.q_layout, self.k_layout):
            if isinstance(name, str) and name not in LAYOUTS:
                raise ValueError(f"layouts must be among {(*LAYOUTS,)}, got {name!r}.")
        if self.shard_lens is not None:
            check_shard_lens("shard_lens", self.shard_lens, self.ranks)
            if sum(self.shard_lens) != self.tokens:
                raise ValueError(
                    f"shard_lens must add up to tokens={self.tokens}, got {sum(self.shard_lens)}."
                )
        if self.cu_seqlens is not None:
            check_cu_seqlens_values("cu_seqlens", self.cu_seqlens, self.tokens)

    @property
    def scale(self) -> float:
        """The softmax scale that is used."""
        return self.sizes.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    @cached_property
    def schedule(self) -> Schedule:
        """The tiles of all ranks."""
        held = self._layout(self.q_layout)
        keys = held if self.k_layout is None else self._layout(self.k_layout)
        return Schedule(held, keys, self.mask)

    def program(self, rank: int, cut: Cut = USUAL) -> Program:
        """What a rank's exchange does."""
        return EXCHANGES[self.exchange].program(self.schedule, rank, cut)

    def tokens_of(self, layout: SequenceLayout, rank: int, rows: Rows | None = None) -> Tensor:
        """Where in the whole sequence some of a rank's rows stand: int64 [rows]; None: all."""
        held = layout.positions(rank)
        if rows is None:
            return token_index(held)
        some = []
        row = 0
        for run in held:
            for start, stop in rows:
                some.append(run[max(start - row, 0) : max(stop - row, 0)])
            row += len(run)
        return token_index(some)

    def _layout(self, chosen: str | SequenceLayout) -> SequenceLayout:
        if not isinstance(chosen, str):
            return chosen
        lens = even_lens(self.tokens, self.ranks) if self.shard_lens is None else self.shard_lens
        layout = LAYOUTS[chosen].for_shards(lens, self.cu_seqlens)
        if self.cu_seqlens is None:
            return layout
        return PackedDocuments(layout, self.cu_seqlens, self.cu_seqlens)


def sides_of(mask: Mask) -> dict[str, int | str | None]:
    """How far a query sees to either side, in tokens; None is without a bound.

    Of a mask that is no window, its text.
    """
    if not isinstance(mask, Window):
        return {"text": mask.text}
    sides = {"left": mask.left, "right": mask.right}
    return {side: None if n == UNBOUNDED else n for side, n in sides.items()}
