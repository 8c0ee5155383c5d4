"""Other packages on the same work: their time and their errors, beside ours.

What a peer cannot do becomes its row's `error`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Contestant, OtherLoad, describe_processes, measure, rounds
from benchmarks.processes import Processes, Worker, WorkerError
from benchmarks.progress import Waiting
from benchmarks.rows import Row, make_row
from benchmarks.work import (
    OPS,
    Run,
    Work,
    context_parallel,
    gather,
    held_tokens,
    layout_of,
    make_run,
    relative_l2,
)

WORLD_SIZE = 2
BUCKET = 512
"""Tokens of a block in ring-attention-pytorch; its own default is 512 in its modules."""


class Peer(NamedTuple):
    """A way to do the work; `positions(work, rank)` tells which tokens a rank holds."""

    name: str
    make: Callable[..., Run]
    args: tuple[Any, ...]
    positions: Callable[[Work, int], Tensor]


def work_of(quick: bool) -> Work:
    """What all of them compute."""
    return Work(512, 2, 2) if quick else Work(4096, 4, 4)


def run(work: Work, *, reps: int, waiting: Waiting) -> Iterator[Row]:
    """A row per peer: the runnable ones are timed in turn, all in one interleaving."""
    with waiting.task("peers: which of them run?", len(PEERS)) as advance:
        errors = _failures(work, advance)
    able = [peer for peer in PEERS if peer.name not in errors]
    truth = exact_results(work)
    with Processes(WORLD_SIZE) as ranks:
        contestants = [Contestant(p.name, ranks, p.make, (work, *p.args)) for p in able]
        with waiting.task(f"peers: {work.name}", rounds(len(able), reps=reps)) as advance:
            load = OtherLoad([ranks])
            measured = measure(contestants, reps=reps, advance=advance)
            other_cores = load.cores()
        parameters = {**work.parameters(), **describe_processes(ranks)}
    for peer in able:
        positions = [peer.positions(work, rank) for rank in range(WORLD_SIZE)]
        samples, parts = measured[peer.name]
        results = {
            "relative_l2_to_float64": _errors(gather(parts, positions), truth),
            "other_cores_busy": other_cores,
        }
        yield make_row("peers", peer.name, parameters, samples=samples, results=results)
    for name, error in errors.items():
        yield make_row("peers", name, parameters, error=error)


def _failures(work: Work, advance: Callable[[], None]) -> dict[str, str]:
    """Why peers do not run, by name; ranks that failed may be out of step and are replaced."""
    errors = {}
    waiting_peers = list(PEERS)
    while waiting_peers:
        with Processes(WORLD_SIZE) as ranks:
            while waiting_peers:
                peer = waiting_peers.pop(0)
                try:
                    ranks.call(_attempt, peer.make, work, *peer.args)
                except WorkerError as error:
                    errors[peer.name] = error.cause
                    break
                finally:
                    advance()
    return errors


def _attempt(worker: Worker, make: Callable[..., Run], *args: Any) -> None:
    make(worker, *args)()


def exact_results(work: Work) -> list[Tensor]:
    """(out, dq, dk, dv) in float64, from the full matrix."""
    *inputs, dout = (x.double() for x in work.tensors(work.tokens))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2)

    assert work.causal and work.num_heads == work.num_kv_heads, work
    return [x.detach() for x in make_run(work, attention, [*inputs, dout])()]


def _errors(results: Sequence[Tensor], truth: Sequence[Tensor]) -> dict[str, float]:
    names = ("out", "dq", "dk", "dv")
    return {
        name: relative_l2(*pair)
        for name, pair in zip(names, zip(results, truth, strict=True), strict=True)
    }


def lucidrains(worker: Worker, work: Work, striped: bool) -> Run:
    """The ring attention function of ring-attention-pytorch, in plain PyTorch for CPU."""
    from ring_attention_pytorch.ring_flash_attention import ring_flash_attn

    held = bucket_striped(work, worker.rank) if striped else contiguous(work, worker.rank)
    tensors = [x[:, held] for x in work.tensors(work.tokens)]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = ring_flash_attn(
            q,
            k,
            v,
            causal=work.causal,
            bucket_size=_bucket(work),
            ring_reduce_col=True,
            striped_ring_attn=striped,
        )
        return out

    return make_run(work, attention, tensors)


def torch_context_parallel(worker: Worker, work: Work) -> Run:
    """PyTorch's own `context_parallel` context manager, by its public interface."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel as parallel

    mesh = init_device_mesh("cpu", (worker.world_size,))
    *inputs, dout = (x.transpose(1, 2).contiguous() for x in work.tensors(work.tokens))
    shard = dout.shape[2] // worker.world_size

    def run_in_context() -> Sequence[Tensor]:
        buffers = [x.clone() for x in inputs]
        with parallel(mesh, buffers=buffers, buffer_seq_dims=[2] * 3):
            q, k, v = (x.detach().requires_grad_() for x in buffers)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=work.causal)
            gradients = torch.autograd.grad(out, (q, k, v), dout[:, :, :shard])
            return [x.transpose(1, 2) for x in (out, *gradients)]

    return run_in_context


def contiguous(work: Work, rank: int) -> Tensor:
    """The tokens that a rank holds in contiguous order."""
    return held_tokens(layout_of("contiguous", work.tokens, WORLD_SIZE), rank)


def zigzag(work: Work, rank: int) -> Tensor:
    """The tokens that a rank holds in zigzag order."""
    return held_tokens(layout_of(OPS["zigzag order"].layout, work.tokens, WORLD_SIZE), rank)


def bucket_striped(work: Work, rank: int) -> Tensor:
    """The stripes of ring-attention-pytorch: token i of bucket b is token i * buckets + b."""
    buckets = work.tokens // _bucket(work)
    order = torch.arange(work.tokens).view(_bucket(work), buckets).t().reshape(-1)
    return order.chunk(WORLD_SIZE)[rank]


def _bucket(work: Work) -> int:
    return min(BUCKET, work.tokens // WORLD_SIZE)


PEERS = [
    Peer(
        "nnscaler_ring zigzag order, direct", context_parallel, ("zigzag order", "direct"), zigzag
    ),
    Peer("nnscaler_ring ring, ring", context_parallel, ("ring", "ring"), contiguous),
    Peer("ring-attention-pytorch ring", lucidrains, (False,), contiguous),
    Peer("ring-attention-pytorch striped", lucidrains, (True,), bucket_striped),
    Peer("torch context_parallel", torch_context_parallel, (), zigzag),
]
