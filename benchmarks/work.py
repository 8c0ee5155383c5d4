"""The attention that is measured: one piece of work, and the ways to do it.

Every maker takes a worker and a `Work` and returns a run: a callable that gives this worker's part
of (out,) or (out, dq, dk, dv), each [1, tokens, heads, head_dim].
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.processes import Worker
from nnscaler_ring import wrap_ring_attn_func, wrap_ring_attn_varlen_func, wrap_zigzag_attn_func
from nnscaler_ring.core.plan.layout import LAYOUTS, SequenceLayout
from nnscaler_ring.core.token_index import token_index

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Run = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Work:
    """One attention over a whole sequence, batch 1: what all contestants of a case compute.

    `window`: how many keys before its own a query sees. `documents`: packed documents of random
    lengths, 1 for a dense call.
    """

    tokens: int
    num_heads: int
    num_kv_heads: int
    dtype: str = "float32"
    backward: bool = True
    causal: bool = True
    window: int | None = None
    documents: int = 1
    head_dim: int = 64

    @property
    def mask(self) -> str:
        """The mask in a few words."""
        mask = "causal" if self.causal else "full"
        mask += f" window {self.window}" if self.window is not None else ""
        return mask + (f" {self.documents} documents" if self.documents > 1 else "")

    @property
    def name(self) -> str:
        """All of it in one line."""
        length = f"{self.tokens // 1024}k" if self.tokens % 1024 == 0 else str(self.tokens)
        passes = "forward+backward" if self.backward else "forward"
        return f"{self.mask} {length} h{self.num_heads}:{self.num_kv_heads} {self.dtype} {passes}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the tensors."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype), self
        return dtype

    def parameters(self) -> dict[str, Any]:
        """For a row."""
        return {"work": self.name, "mask": self.mask, **asdict(self)}

    def tensors(self, rows: int) -> list[Tensor]:
        """q, k, v, dout of so many tokens, the same in every process."""
        generator = torch.Generator().manual_seed(0)
        heads = self.num_heads, self.num_kv_heads, self.num_kv_heads, self.num_heads
        return [
            torch.randn(1, rows, h, self.head_dim, generator=generator).to(self.torch_dtype)
            for h in heads
        ]

    def cu_seqlens(self) -> Tensor:
        """int32 [documents + 1]; no document is empty."""
        generator = torch.Generator().manual_seed(0)
        cuts = torch.randperm(self.tokens - 1, generator=generator)[: self.documents - 1] + 1
        ends = torch.tensor([0, self.tokens])
        return torch.cat([ends, cuts]).sort().values.to(torch.int32)

    def lengths(self) -> list[int]:
        """Tokens of each document."""
        return [int(n) for n in self.cu_seqlens().diff()]


class Op(NamedTuple):
    """A public function as it is called here: its rows as held, and as computed."""

    function: Callable[..., Any]
    layout: str
    compute_layout: str
    options: dict[str, Any]


OPS = {
    "zigzag order": Op(wrap_zigzag_attn_func, "zigzag", "zigzag", {"layout": "zigzag"}),
    "zigzag contiguous": Op(wrap_zigzag_attn_func, "contiguous", "zigzag", {}),
    "ring": Op(wrap_ring_attn_func, "contiguous", "contiguous", {}),
    "varlen": Op(wrap_ring_attn_varlen_func, "contiguous", "contiguous", {}),
}


def layout_of(name: str, tokens: int, world_size: int) -> SequenceLayout:
    """A layout of equal shards."""
    assert tokens % world_size == 0, (tokens, world_size)
    return LAYOUTS[name].for_shards([tokens // world_size] * world_size)


def held_tokens(layout: SequenceLayout, rank: int) -> Tensor:
    """The positions of the tokens that a rank holds, in the order of its rows."""
    return token_index(layout.positions(rank))


def gather(parts: Sequence[Sequence[Tensor]], positions: Sequence[Tensor]) -> list[Tensor]:
    """Whole tensors from the ranks' parts."""
    gathered = []
    for shards in zip(*parts, strict=True):
        order = torch.cat(list(positions)).argsort()
        gathered.append(torch.cat(shards, dim=1)[:, order])
    return gathered


def make_run(work: Work, attention: Attention, tensors: Sequence[Tensor]) -> Run:
    """A forward pass, or a forward pass and the gradients of q, k, v."""
    *inputs, dout = tensors

    def forward() -> Sequence[Tensor]:
        with torch.no_grad():
            return (attention(*inputs),)

    def forward_and_backward() -> Sequence[Tensor]:
        out = attention(*inputs)
        return (out, *torch.autograd.grad(out, inputs, dout))

    if not work.backward:
        return forward
    inputs = [x.requires_grad_() for x in inputs]
    return forward_and_backward


def context_parallel(worker: Worker, work: Work, op: str, exchange: str) -> Run:
    """Ours, over all workers; one worker alone calls it without a group."""
    layout = layout_of(OPS[op].layout, work.tokens, worker.world_size)
    held = held_tokens(layout, worker.rank)
    tensors = [x[:, held] for x in work.tensors(work.tokens)]
    return make_run(work, our_attention(worker, work, op, exchange), tensors)


def our_attention(worker: Worker, work: Work, op: str, exchange: str) -> Attention:
    """The call of a public function, ready for q, k, v."""
    group = list(range(worker.world_size)) if worker.world_size > 1 else None
    options = {
        "causal": work.causal,
        "window_size": (-1 if work.window is None else work.window, -1),
        "process_group": group,
        "exchange": exchange,
        **OPS[op].options,
    }
    function = OPS[op].function
    if op != "varlen":
        return lambda q, k, v: function(q, k, v, **options)
    cu = work.cu_seqlens()

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = function(q.squeeze(0), k.squeeze(0), v.squeeze(0), cu, cu, **options)
        return out.unsqueeze(0)

    return packed


def sdpa(worker: Worker, work: Work, heads_first: bool = False) -> Run:
    """PyTorch's attention in one process, documents one by one; a window is not applied.

    `heads_first`: tensors lie in memory as [batch, heads, tokens, head_dim], which its kernel reads
    a little faster than the public layout of ours.
    """
    assert worker.world_size == 1, worker
    tensors = work.tensors(work.tokens)
    if heads_first:
        tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    return make_run(work, sdpa_attention(work), tensors)


def sdpa_attention(work: Work) -> Attention:
    """`F.scaled_dot_product_attention` on [batch, tokens, heads, head_dim]."""
    lengths = work.lengths()

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=work.causal,
            enable_gqa=work.num_heads != work.num_kv_heads,
        )
        return out.transpose(1, 2)

    def by_document(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # One split instead of slices: the gradient of each slice would be as long as the sequence.
        pieces = zip(*(x.split(lengths, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([dense(*piece) for piece in pieces], dim=1)

    return dense if work.documents == 1 else by_document


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """The relative error |actual - expected| / |expected|, in float64."""
    error = torch.linalg.vector_norm(actual.double() - expected.double())
    return float(error / torch.linalg.vector_norm(expected.double()))
