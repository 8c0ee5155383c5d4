"""Generated attention calls over several ranks, and their comparison with dense float64."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nnscaler_ring import wrap_ring_attn_func, wrap_ring_attn_varlen_func, wrap_zigzag_attn_func
from nnscaler_ring.core.exchange import EXCHANGES as REGISTERED
from nnscaler_ring.core.plan.layout import LAYOUTS
from nnscaler_ring.core.sums.online_softmax import merge_
from nnscaler_ring.core.token_index import token_index
from tests.oracle import dense_gradients, make_dout, make_qkv, random_cu_seqlens
from tests.ranks import RankPool
from tests.tolerances import assert_close_float64

OPS = ("ring", "zigzag", "zigzag in zigzag order", "varlen")
EXCHANGES = tuple(REGISTERED)
MASKS = (
    {"causal": True},
    {"causal": False},
    {"causal": True, "window_size": (3, -1)},
    {"causal": True, "window_size": (11, 0)},
    {"causal": True, "window_size": (0, 0)},
    {"causal": False, "window_size": (5, 2)},
    {"causal": False, "window_size": (-1, 4)},
    {"causal": False, "window_size": (2, -1)},
    {"causal": False, "window_size": (40, 40)},
)
HEADS = ((2, 2), (6, 2), (4, 1))
SHARDS = ("equal", "uneven", "one empty", "one token", "mostly empty")


@dataclass(frozen=True)
class Case:
    """One call of a public op over `world_size` ranks."""

    op: str
    exchange: str
    world_size: int
    causal: bool
    window_size: tuple[int, int]
    heads: tuple[int, int]
    shard_lens: tuple[int, ...]
    shard_lens_k: tuple[int, ...]
    cu_seqlens_q: tuple[int, ...] | None
    cu_seqlens_k: tuple[int, ...] | None
    v_head_dim: int
    kernel: str
    seed: int
    head_dim: int = 4
    mask: str | None = None

    def in_zigzag_order(self) -> "Case":
        """With shard lengths as the zigzag layout gives them."""
        lens = LAYOUTS["zigzag"].for_shards(self.shard_lens).shard_lens
        return replace(self, shard_lens=lens, shard_lens_k=lens)

    def on(self, device: str) -> "Case":
        """With the device's own kernel in place of the CPU's."""
        if device == "cpu" or self.kernel != "torch_cpu":
            return self
        return replace(self, kernel="torch_cuda")

    def inputs(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, dout of the whole sequence, the same on every rank."""
        batch = None if self.op == "varlen" else 1 + self.seed % 2
        q, k, v = make_qkv(
            self.seed,
            batch,
            sum(self.shard_lens),
            sum(self.shard_lens_k),
            *self.heads,
            self.head_dim,
            self.v_head_dim,
            dtype,
        )
        return q, k, v, make_dout(self.seed, q, v)


def all_cases(seed: int) -> Iterator[Case]:
    """The product of everything, in a random but repeatable order of shard lengths."""
    rng = random.Random(seed)
    for number, (op, exchange, world_size, mask, heads, shards) in enumerate(
        itertools.product(OPS, EXCHANGES, (1, 2, 3, 4), MASKS, HEADS, SHARDS)
    ):
        lens = make_shard_lens(rng, shards, world_size)
        if op == "zigzag in zigzag order":
            lens = list(LAYOUTS["zigzag"].for_shards(lens).shard_lens)
        yield Case(
            op=op,
            exchange=exchange,
            world_size=world_size,
            causal=bool(mask["causal"]),
            window_size=mask.get("window_size", (-1, -1)),  # type: ignore[arg-type]
            heads=heads,
            shard_lens=tuple(lens),
            **make_documents(rng, op, lens, world_size),
            v_head_dim=rng.choice((4, 4, 2, 6)),
            kernel=rng.choice(("reference", "torch_cpu", "torch_cpu")),
            seed=number,
        )


def random_packings(seed: int, count: int) -> Iterator[Case]:
    """Packed documents of any lengths over any shards."""
    rng = random.Random(seed)
    for number in range(count):
        world_size = rng.randint(1, 4)
        lens = [rng.randint(0, 20) for _ in range(world_size)]
        mask = rng.choice(MASKS)
        yield Case(
            op="varlen",
            exchange=rng.choice(EXCHANGES),
            world_size=world_size,
            causal=bool(mask["causal"]),
            window_size=mask.get("window_size", (-1, -1)),  # type: ignore[arg-type]
            heads=rng.choice(HEADS),
            shard_lens=tuple(lens),
            **make_documents(rng, "varlen", lens, world_size),
            v_head_dim=4,
            kernel="torch_cpu",
            seed=number,
        )


def sample(cases: Iterator[Case], count: int, seed: int) -> list[Case]:
    """A repeatable random sample, the same cost per number of ranks."""
    return random.Random(seed).sample(list(cases), count)


def start_on(ranks: list[int], device: str) -> None:
    """What a process does once on a device: its context, its libraries, kernels that are compiled.

    It may take longer than ranks wait for each other, and not all ranks of a test come to it at
    the same time.
    """
    q = torch.ones(1, 4, 2, 8, dtype=torch.float64, device=device, requires_grad=True)
    out, lse = wrap_ring_attn_func(q, q, q, return_lse=True)
    out.sum().backward()
    merge_(out.detach(), lse.detach(), q.detach(), lse.detach())
    if device == "cuda":
        torch.cuda.synchronize()


def check(
    pool: RankPool,
    cases: Sequence[Case],
    *,
    ranks: Sequence[int] | None = None,
    device: str = "cpu",
) -> None:
    """Run the cases on a device and compare out, lse, dq, dk, dv with dense float64 attention.

    `ranks`: the pool's ranks in block order, for the cases with as many; default 0, 1, 2, ...
    """
    by_size: dict[int, list[Case]] = {}
    for case in (case.on(device) for case in cases):
        by_size.setdefault(case.world_size, []).append(case)
    for size, group in by_size.items():
        chosen = list(ranks) if ranks else list(range(size))
        shards = pool.run(None, run_cases, group, device, ranks=chosen, timeout=240 + len(group))
        check_results(group, shards)


def check_results(cases: Sequence[Case], shards: Sequence[Sequence[list[Tensor]]]) -> None:
    """Compare what `run_cases` returned, rank by rank, with dense float64 attention."""
    for number, case in enumerate(cases):
        _compare(case, [shard[number] for shard in shards])


def run_cases(ranks: list[int], cases: list[Case], device: str = "cpu") -> list[list[Tensor]]:
    """On one rank: out, lse, dq, dk, dv of this rank's rows for every case."""
    block = ranks.index(torch.distributed.get_rank())
    group = ranks if len(ranks) > 1 else None
    return [run_case(case, block, group, device=device) for case in cases]


def run_case(
    case: Case,
    block: int,
    group: list[int] | None,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> list[Tensor]:
    """The case on the rank that holds `block`; results on the CPU."""
    q, k, v, dout = case.inputs(dtype)
    rows, rows_k = rows_of(case, block), rows_of(case, block, keys=True)
    dim = 0 if case.op == "varlen" else 1
    q, dout = (x.index_select(dim, rows) for x in (q, dout))
    k, v = (x.index_select(dim, rows_k) for x in (k, v))
    q, k, v, dout = (x.to(device) for x in (q, k, v, dout))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, lse = call(case, q, k, v, group)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    return [x.detach().cpu() for x in (out, lse, *gradients)]


def call(
    case: Case, q: Tensor, k: Tensor, v: Tensor, group: list[int] | None, **more: Any
) -> tuple[Tensor, Tensor]:
    """The public function, with every argument of the case and `more`."""
    seen = {"causal": case.causal, "window_size": case.window_size}
    options = {
        **({"mask": case.mask} if case.mask else seen),
        "process_group": group,
        "exchange": case.exchange,
        "kernel": case.kernel,
        "return_lse": True,
        "shard_lens": None if len(set(case.shard_lens)) == 1 else list(case.shard_lens),
        **more,
    }
    if case.op == "varlen":
        if case.shard_lens_k != case.shard_lens:
            options["shard_lens_k"] = list(case.shard_lens_k)
        cu_seqlens = (torch.tensor(x) for x in (case.cu_seqlens_q, case.cu_seqlens_k))
        return wrap_ring_attn_varlen_func(q, k, v, *cu_seqlens, **options)
    if case.op == "ring":
        return wrap_ring_attn_func(q, k, v, **options)
    layout = "contiguous" if case.op == "zigzag" else "zigzag"
    return wrap_zigzag_attn_func(q, k, v, **options, layout=layout)


def _compare(case: Case, shards: list[list[Tensor]]) -> None:
    q, k, v, dout = case.inputs()
    expected = dense_gradients(
        q,
        k,
        v,
        dout,
        causal=case.causal,
        window_size=case.window_size,
        mask=case.mask,
        cu_seqlens_q=case.cu_seqlens_q,
        cu_seqlens_k=case.cu_seqlens_k,
    )
    for block, shard in enumerate(shards):
        for name, actual, dense in zip(
            ("out", "lse", "dq", "dk", "dv"), shard, expected, strict=True
        ):
            dim = -1 if name == "lse" else -3
            rows = rows_of(case, block, keys=name in ("dk", "dv"))
            assert_close_float64(
                actual, dense.index_select(dim, rows), f"{name} of block {block} in {case}"
            )


def rows_of(case: Case, block: int, keys: bool = False) -> Tensor:
    """The tokens of a block in the caller's layout."""
    name = "zigzag" if case.op == "zigzag in zigzag order" else "contiguous"
    layout = LAYOUTS[name].for_shards(case.shard_lens_k if keys else case.shard_lens)
    return token_index(layout.positions(block))


def make_shard_lens(rng: random.Random, kind: str, world_size: int) -> list[int]:
    if kind == "equal":
        return [rng.randint(1, 9)] * world_size
    lens = [rng.randint(1, 9) for _ in range(world_size)]
    if kind == "one empty":
        lens[rng.randrange(world_size)] = 0
    elif kind == "one token":
        lens = [1] * world_size
    elif kind == "mostly empty":
        lens = [0] * world_size
        lens[rng.randrange(world_size)] = rng.randint(1, 3)
    return lens


def make_documents(
    rng: random.Random, op: str, lens: list[int], world_size: int
) -> dict[str, tuple[int, ...] | None]:
    """shard_lens_k, cu_seqlens_q and cu_seqlens_k."""
    if op != "varlen":
        return {"shard_lens_k": tuple(lens), "cu_seqlens_q": None, "cu_seqlens_k": None}
    lens_k = lens if rng.random() < 0.5 else [rng.randint(0, 9) for _ in range(world_size)]
    documents = rng.randint(1, 7)
    cu_q = random_cu_seqlens(rng, sum(lens), documents)
    cu_k = cu_q
    if lens_k != lens or rng.random() < 0.3:
        cu_k = random_cu_seqlens(rng, sum(lens_k), documents)
    return {
        "shard_lens_k": tuple(lens_k),
        "cu_seqlens_q": tuple(cu_q.tolist()),
        "cu_seqlens_k": tuple(cu_k.tolist()),
    }
