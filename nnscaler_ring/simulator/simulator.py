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

from nnscaler_ring.core.engine import Gradients, attention_backward, attention_forward
from nnscaler_ring.core.exchange import KVExchange, Performance
from nnscaler_ring.core.kernels import AttentionKernel, BackwardTensors, select_kernel
from nnscaler_ring.core.plan.schedule import Rows
from nnscaler_ring.core.ranks.groups import Traffic
from nnscaler_ring.core.scores.scores import Scores
from nnscaler_ring.simulator.call import SimulatedCall
from nnscaler_ring.simulator.inputs import Inputs
from nnscaler_ring.simulator.score_options import PLAIN, ScoreOptions
from nnscaler_ring.simulator.stand_in import Peers, Queries


class Share(NamedTuple):
    """One rank's results: [batch, its tokens, heads, head_dim], lse [batch, heads, its tokens].

    Gradients are None without a backward pass. `sent` is what the rank sent in all. `dbias` has
    the rank's rows, `dsinks` is its part of a sum over ranks; None where there are no such options.
    """

    out: Tensor
    softmax_lse: Tensor
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    sent: Traffic
    dbias: Tensor | None = None
    dsinks: Tensor | None = None


class Results(NamedTuple):
    """All ranks' results in the order of the tokens, and what each rank sent."""

    out: Tensor
    softmax_lse: Tensor
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    sent: list[Traffic]
    dbias: Tensor | None = None
    dsinks: Tensor | None = None


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
        options: softcap, ALiBi, bias, sinks, dropout.

    Raises:
        ValueError: an option that the public functions refuse, or no kernel computes this on the
            device.

    Source: Liu et al., "Ring Attention with Blockwise Transformers", arXiv 2310.01889.
    """

    def __init__(
        self,
        call: SimulatedCall,
        inputs: Inputs,
        device: str = "cpu",
        options: ScoreOptions = PLAIN,
    ) -> None:
        options.check(call, device)
        self.call = call
        self.inputs = inputs
        self.device = device
        self.options = options
        problem = options.problem(call.sizes.problem(torch.device(device).type))
        self.kernel = select_kernel(call.kernel, problem)
        self._shares = _Shares(self)
        self._peers = Peers(
            call.schedule, self._shares, self.kernel, call.program, self._scores, call.sizes.batch
        )

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
        gradients, sent_back = self._backward(rank, Queries(dout, q, out, lse), k, v, watch)
        sent = Traffic() - (Traffic() - sent - sent_back)
        return Share(out, lse, *gradients[:3], sent, *gradients[3:])

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
            gradients, sent = self._backward(rank, self._shares.queries(rank), k, v, _Nobody())
            tokens, tokens_k = (
                self.tokens(layout, rank) for layout in (schedule.q_layout, schedule.k_layout)
            )
            whole.put("dq", 1, tokens, gradients.dq)
            whole.put("dk", 1, tokens_k, gradients.dk)
            whole.put("dv", 1, tokens_k, gradients.dv)
            if gradients.dbias is not None:
                whole.put("dbias", 2, tokens, gradients.dbias)
            if gradients.dsinks is not None:
                whole.add("dsinks", gradients.dsinks)
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

    def _scores(self, rank: int, watch: Observer | None = None, *, dbias: bool = False) -> Scores:
        bias = self.options.bias_rows(self.tokens(self.call.schedule.q_layout, rank))
        if bias is not None and watch is not None:
            watch.own(bias=bias)
        return self.options.scores(self.call, rank, bias, dbias=dbias)

    def _forward(
        self, rank: int, q: Tensor, k: Tensor, v: Tensor, watch: Observer
    ) -> tuple[Tensor, Tensor, Traffic]:
        transport = self._peers.stand_in(rank, backward=False, aside=watch.aside)
        exchange = Performance(self.call.program(rank), transport)
        with watch.running():
            out, lse = attention_forward(
                q,
                k,
                v,
                exchange=watch.exchange(exchange),
                kernel=watch.kernel(self.kernel),
                scores=self._scores(rank, watch),
                sinks=self.options.sinks,
            )
        assert transport.traffic is not None
        return out, lse, transport.traffic

    def _backward(
        self, rank: int, own: Queries, k: Tensor, v: Tensor, watch: Observer
    ) -> tuple[Gradients, Traffic]:
        transport = self._peers.stand_in(rank, backward=True, aside=watch.aside)
        exchange = Performance(self.call.program(rank), transport)
        with watch.running():
            gradients = attention_backward(
                BackwardTensors(own.dout, None, own.q, k, v, own.out, own.softmax_lse),
                exchange=watch.exchange(exchange),
                kernel=watch.kernel(self.kernel),
                scores=self._scores(rank, watch, dbias=True),
                sinks=self.options.sinks,
            )
        if gradients.dbias is not None and self.options.bias is not None:
            gradients = gradients._replace(dbias=gradients.dbias.to(self.options.bias.dtype))
        assert transport.traffic is not None
        return gradients, transport.traffic


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

    def add(self, name: str, part: Tensor) -> None:
        self.tensors[name] = self.tensors[name] + part if name in self.tensors else part

    def take(self, name: str, dim: int, tokens: Tensor) -> Tensor:
        x = self.tensors[name]
        return x.index_select(dim, tokens.to(x.device))

    def results(self) -> Results:
        out, lse = self.tensors["out"], self.tensors["softmax_lse"]
        names = ("dq", "dk", "dv", "dbias", "dsinks")
        dq, dk, dv, dbias, dsinks = (self.tensors.get(name) for name in names)
        return Results(out, lse, dq, dk, dv, self.sent, dbias, dsinks)
