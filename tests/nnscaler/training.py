"""Training a small transformer under nnScaler, and the same training on one device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler_ring import policies
from nnscaler_ring.tools.demo.model import Decoder
from tests.nnscaler.models import CONFIG, TOKENS, arguments, transformer
from tests.nnscaler.runtime import nnscaler_ranks, parallelize

POLICIES: dict[str, Callable[..., Any]] = {
    "sequence": policies.shard_sequence,
    "sequence and heads": partial(policies.shard_sequence_and_heads, ways=2),
    "sequence and batch": partial(policies.shard_sequence_and_batch, ways=2),
}
BATCH = 4


@dataclass(frozen=True)
class Training:
    """How to train: `resume_after` steps the state is saved, merged and loaded into a new model."""

    policy: str = "sequence"
    plan_ngpus: int = 2
    op: str = "ring"
    use_zero: int = 0
    max_norm: float | None = None
    steps: int = 3
    resume_after: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """nnScaler's clip_gnorm takes no float64."""
        return torch.float64 if self.max_norm is None else torch.float32


@dataclass
class Record:
    """What happened. Gradients are those of the first step, by the model's own names."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    linear_tokens: set[tuple[int, ...]] = field(default_factory=set)
    linears: int = 0
    code: str = ""


def make_model(training: Training) -> Decoder:
    torch.manual_seed(1)
    return transformer(training.op).to(training.dtype)


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    """Token ids and labels of a step, the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, CONFIG.num_bytes, (BATCH, TOKENS + 1), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)


def train_on_one_device(training: Training) -> Record:
    model, record = make_model(training), Record()
    optimizer = ADAMW(model.parameters())
    for step in range(training.steps):
        loss = model(**arguments(*batch_of(step)))
        loss.backward()
        record.losses.append(loss.item())
        if not step:
            record.gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
        if training.max_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_norm)
            record.norms.append(norm.item())
        optimizer.step()
        optimizer.zero_grad()
    record.weights = {name: x.detach() for name, x in model.state_dict().items()}
    return record


def train(ranks: list[int], training: Training) -> Record:
    """On one rank. Scale units get a part of the batch each."""
    record = Record()
    units = len(ranks) // training.plan_ngpus
    unit = dist.get_rank() // training.plan_ngpus
    rows = slice(unit * BATCH // units, (unit + 1) * BATCH // units)
    with nnscaler_ranks() as nnscaler:

        def build() -> tuple[Any, Any, str]:
            ids, labels = (x[rows] for x in batch_of(0))
            model, code = parallelize(
                nnscaler,
                make_model(training),
                arguments(ids, labels),
                POLICIES[training.policy],
                training.plan_ngpus,
                use_zero=training.use_zero,
            )
            return model, nnscaler.build_optimizer(model, ADAMW), code

        model, optimizer, record.code = build()
        for step in range(training.steps):
            if step == training.resume_after:
                states = gather_states(model, optimizer)
                model, optimizer, _ = build()
                with torch.no_grad():
                    for x in model.parameters():
                        x.zero_()
                module_state, optimizer_state = nnscaler.merge_state_dicts(*states)
                nnscaler.load_merged_state_dict(model, module_state, optimizer, optimizer_state)
            with watched_linears(record):
                loss = model(**arguments(*(x[rows] for x in batch_of(step))))
            loss.backward()
            total = loss.detach().clone()
            dist.all_reduce(total)
            record.losses.append(total.item() / training.plan_ngpus)
            optimizer.sync_shard_grad()
            if not step and not training.use_zero:
                names = {local: meta.orig_name for local, meta in model.fullmap.items()}
                record.gradients = {
                    names[n]: p.grad.clone() for n, p in model.named_parameters() if n in names
                }
            if training.max_norm is not None:
                record.norms.append(optimizer.clip_gnorm(training.max_norm).item())
            optimizer.step()
            optimizer.zero_grad()
        record.weights, _ = nnscaler.merge_state_dicts(*gather_states(model, optimizer))
    return record


def gather_states(model: Any, optimizer: Any) -> tuple[list[Any], list[Any]]:
    """Every rank's state dicts, as from the files of a checkpoint."""
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, (model.state_dict(), optimizer.state_dict()))
    return [state[0] for state in states], [state[1] for state in states]


@contextmanager
def watched_linears(record: Record) -> Iterator[None]:
    """Note how many rows every linear of the generated code gets."""
    original = torch.nn.functional.linear

    def linear(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        record.linear_tokens.add(tuple(x.shape[:-1]))
        record.linears += 1
        return original(x, *args, **kwargs)

    torch.nn.functional.linear = linear
    try:
        yield
    finally:
        torch.nn.functional.linear = original
