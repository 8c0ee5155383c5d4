"""The real engine and kernels of N ranks, in one process, one rank after another.

Note [One rank's share]
    A rank's own rows are tensors; what reaches it in messages is made when the message is posted:
    keys from the inputs, gradients by the peer's backward pass over the keys that they belong to.
    So the memory is one rank's, and the results are the bits of the distributed run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nnscaler_ring.core.engine import attention_backward, attention_forward
from nnscaler_ring.core.exchange import KVExchange
from nnscaler_ring.core.groups import Traffic
from nnscaler_ring.core.kernels import AttentionKernel, select_kernel
from nnscaler_ring.core.schedule import Rows
from nnscaler_ring.core.scores import Scores
from nnscaler_ring.simulator.call import SimulatedCall
from nnscaler_ring.simulator.inputs import Inputs
from nnscaler_ring.simulator.stand_in import Peers, Queries, exchange_plan, stand_in


class Share(NamedTuple):
    """One rank's results: [batch, its tokens, heads, head_dim], lse [batch, heads, its tokens].

    Gradients are None without a backward pass. `sent` is what the rank sent in all.
    """

    out: Tensor
    softmax_lse: Tensor
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    sent: Traffic


class Results(NamedTuple):
    """All ranks' results in the order of the tokens, and what each rank sent."""

    out: Tensor
    softmax_lse: Tensor
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    sent: list[Traffic]


class Observer(Protocol):
    """Watches a rank's work: sees its tensors, its kernel and its exchange."""

    def own(self, **tensors: Tensor) -> None:
        """Tensors that the rank holds before a pass."""
        ...

    def kernel(self, kernel: AttentionKernel) -> AttentionKernel:
        """The kernel, or one that passes calls on to it."""
        ...

    def exchange(self, exchange: KVExchange) -> KVExchange:
        """The exchange, or one that passes steps on from it."""
        ...

    def aside(self) -> AbstractContextManager[object]:
        """Entered while other ranks' work is done."""
        ...

    def running(self) -> AbstractContextManager[object]:
        """Entered while the rank itself runs a pass."""
        ...


class _Nobody:
    """Watches nothing."""

    def own(self, **tensors: Tensor) -> None:
        pass

    def kernel(self, kernel: AttentionKernel) -> AttentionKernel:
        return kernel

    def exchange(self, exchange: KVExchange) -> KVExchange:
        return exchange

    def aside(self) -> AbstractContextManager[object]:
        return torch.no_grad()

    def running(self) -> AbstractContextManager[object]:
        return torch.no_grad()


class RingAttentionSimulator:
    """Runs an N-rank attention in one process on one device, forward and backward.

    The loops, the exchange, the kernel and the merging are those of the distributed run, and so
    are the results, bit for bit, in the same dtype on the same device.

    Args:
        call: what is computed, over how many ranks.
        inputs: tensors of the whole sequence (`WholeInputs`), or rows made from the number of
            the token (`GeneratedInputs`), so that nobody holds the whole sequence.
        device: where to compute.

    Raises:
        ValueError: no kernel computes this on the device.

    Source: Liu et al., "Ring Attention with Blockwise Transformers", arXiv 2310.01889.
    """

    def __init__(self, call: SimulatedCall, inputs: Inputs, device: str = "cpu") -> None:
        self.call = call
        self.inputs = inputs
        self.device = device
        problem = call.sizes.problem(torch.device(device).type)
        self.kernel = select_kernel(call.kernel, problem)
        self._shares = _Shares(self)
        self._peers = Peers(call.schedule, self._shares, self.kernel, call.scale)

    def rank_share(
        self, rank: int, *, backward: bool = False, observer: Observer | None = None
    ) -> Share:
        """One rank's share, with only that share in memory.

        Keys of other ranks are made when they are needed. The backward pass also needs the forward
        results of the ranks that read this one's keys: they are computed when they are asked for,
        which takes as long as those ranks' forward passes.

        Raises:
            ValueError: there is no such rank.
        """
        if not 0 <= rank < self.call.ranks:
            raise ValueError(f"rank must be 0 to {self.call.ranks - 1}, got {rank}.")
        watch = observer or _Nobody()
        q = self.queries("q", rank)
        k, v = self._shares.keys(rank)
        watch.own(q=q, k=k, v=v)
        out, lse, sent = self._forward(rank, q, k, v, watch)
        if not backward:
            return Share(out, lse, None, None, None, sent)
        dout = self.queries("dout", rank)
        watch.own(dout=dout, out=out, softmax_lse=lse)
        dq, dk, dv, sent_back = self._backward(rank, Queries(dout, q, out, lse), k, v, watch)
        return Share(out, lse, dq, dk, dv, Traffic() - (Traffic() - sent - sent_back))

    def all_ranks(
        self,
        *,
        backward: bool = False,
        on_share: Callable[[int], object] = lambda rank: None,
    ) -> Results:
        """Every rank in turn: the results of the whole sequence, O(tokens) memory for them.

        `on_share(rank)` is called after each rank's forward pass, and after each backward pass.
        """
        schedule = self.call.schedule
        whole = _Whole(self)
        for rank in range(self.call.ranks):
            share = self.rank_share(rank)
            tokens = self.tokens(schedule.q_layout, rank)
            whole.put("out", 1, tokens, share.out)
            whole.put("softmax_lse", 2, tokens, share.softmax_lse)
            whole.sent.append(share.sent)
            on_share(rank)
        if not backward:
            return whole.results()
        self._shares.known = whole
        for rank in range(self.call.ranks):
            k, v = self._shares.keys(rank)
            *gradients, sent = self._backward(rank, self._shares.queries(rank), k, v, _Nobody())
            tokens, tokens_k = (
                self.tokens(layout, rank) for layout in (schedule.q_layout, schedule.k_layout)
            )
            for name, x in zip(("dq", "dk", "dv"), gradients, strict=True):
                whole.put(name, 1, tokens if name == "dq" else tokens_k, x)
            whole.sent[rank] = Traffic() - (Traffic() - whole.sent[rank] - sent)
            on_share(rank)
        self._shares.known = None
        return whole.results()

    def queries(self, name: str, rank: int) -> Tensor:
        """A rank's rows of q or dout."""
        tokens = self.tokens(self.call.schedule.q_layout, rank)
        return self.inputs.rows(name, tokens).to(self.device)

    def tokens(self, layout: object, rank: int, rows: Rows | None = None) -> Tensor:
        """Where in the sequence a rank's rows stand."""
        return self.call.tokens_of(layout, rank, rows)  # type: ignore[arg-type]

    def _forward(
        self, rank: int, q: Tensor, k: Tensor, v: Tensor, watch: Observer
    ) -> tuple[Tensor, Tensor, Traffic]:
        plan = exchange_plan(self.call.exchange, self.call.schedule, rank)
        transport = stand_in(plan, rank, self._peers, backward=False, aside=watch.aside)
        with watch.running():
            out, lse = attention_forward(
                q,
                k,
                v,
                exchange=watch.exchange(plan.start(transport)),
                kernel=watch.kernel(self.kernel),
                scores=Scores(self.call.scale),
            )
        assert transport.traffic is not None
        return out, lse, transport.traffic

    def _backward(
        self, rank: int, own: Queries, k: Tensor, v: Tensor, watch: Observer
    ) -> tuple[Tensor, Tensor, Tensor, Traffic]:
        plan = exchange_plan(self.call.exchange, self.call.schedule, rank)
        transport = stand_in(plan, rank, self._peers, backward=True, aside=watch.aside)
        with watch.running():
            dq, dk, dv, *_ = attention_backward(
                own.dout,
                None,
                own.q,
                k,
                v,
                own.out,
                own.softmax_lse,
                exchange=watch.exchange(plan.start(transport)),
                kernel=watch.kernel(self.kernel),
                scores=Scores(self.call.scale),
            )
        assert transport.traffic is not None
        return dq, dk, dv, transport.traffic


@dataclass
class _Shares:
    """What the ranks hold: Note [One rank's share]. `known`: results that need no computing."""

    simulator: RingAttentionSimulator
    known: _Whole | None = None
    _latest: tuple[int, Queries] | None = None

    def keys(self, rank: int, rows: Rows | None = None) -> tuple[Tensor, Tensor]:
        s = self.simulator
        tokens = s.tokens(s.call.schedule.k_layout, rank, rows)
        k, v = (s.inputs.rows(name, tokens).to(s.device) for name in ("k", "v"))
        return k, v

    def queries(self, rank: int) -> Queries:
        s = self.simulator
        if self._latest is None or self._latest[0] != rank:
            self._latest = None  # one peer's share at a time
            q, dout = s.queries("q", rank), s.queries("dout", rank)
            if self.known is not None:
                tokens = s.tokens(s.call.schedule.q_layout, rank)
                out = self.known.take("out", 1, tokens)
                lse = self.known.take("softmax_lse", 2, tokens)
            else:
                out, lse, _ = s._forward(rank, q, *self.keys(rank), _Nobody())
            self._latest = rank, Queries(dout, q, out, lse)
        return self._latest[1]


@dataclass
class _Whole:
    """Tensors of the whole sequence, filled rank by rank."""

    simulator: RingAttentionSimulator
    tensors: dict[str, Tensor] = field(default_factory=dict)
    sent: list[Traffic] = field(default_factory=list)

    def put(self, name: str, dim: int, tokens: Tensor, share: Tensor) -> None:
        if name not in self.tensors:
            shape = list(share.shape)
            shape[dim] = self.simulator.call.tokens
            self.tensors[name] = share.new_zeros(shape)
        self.tensors[name].index_copy_(dim, tokens.to(share.device), share)

    def take(self, name: str, dim: int, tokens: Tensor) -> Tensor:
        x = self.tensors[name]
        return x.index_select(dim, tokens.to(x.device))

    def results(self) -> Results:
        names = ("out", "softmax_lse", "dq", "dk", "dv")
        out, lse, dq, dk, dv = (self.tensors.get(name) for name in names)
        assert out is not None and lse is not None
        return Results(out, lse, dq, dk, dv, self.sent)
