"""On the ranks of a group: a sharded model beside the unsharded one, in float64."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler_ring import set_agreement_timeout
from nnscaler_ring.hf import apply_ring_attention, shard_batch
from tests.hf import dense_attention
from tests.hf.architectures import ARCHITECTURES, VOCABULARY

DOCUMENTS = (11, 1, 17, 8)  # tokens of each, where a batch is packed
TOKENS = sum(DOCUMENTS)
PADDING = (9, 3)  # tokens of padding at the end of each row
IGNORED = -100


def make_batch(case: str, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Whole sequences: "dense" and "padded" have two rows, "packed" one of several documents."""
    generator = torch.Generator().manual_seed(7)
    size = 1 if case == "packed" else 2
    ids = torch.randint(3, VOCABULARY, (size, tokens), generator=generator)
    labels = ids.clone()
    labels[:, : tokens // 7] = IGNORED
    batch = {"input_ids": ids, "labels": labels}
    if case == "packed":
        positions = torch.cat([torch.arange(n) for n in DOCUMENTS])
        labels[:, positions == 0] = IGNORED
        batch["position_ids"] = positions[None]
    if case == "padded":
        mask = torch.ones_like(ids)
        for row, length in enumerate(PADDING):
            mask[row, tokens - length :] = 0
        batch["attention_mask"] = mask
        batch["labels"] = labels.masked_fill(mask == 0, IGNORED)
    return batch


def whole_logits(model: Any, case: str, batch: dict[str, Tensor]) -> Tensor:
    """Of the unsharded model. Packed documents go through it alone, one after another.

    transformers' dense masks let the packed documents of some models see each other.
    """
    if case == "packed":
        documents = batch["input_ids"].split(DOCUMENTS, 1)
        return torch.cat([model(input_ids=x, use_cache=False).logits for x in documents], 1)
    others = {k: v for k, v in batch.items() if k != "labels"}
    return model(**others, use_cache=False).logits


def compare(
    ranks: list[int] | None, name: str, case: str, layout: str, tokens: int = TOKENS, **more: Any
) -> dict[str, float]:
    """The largest errors of logits, loss and gradients; gradients relative to their largest."""
    dense_attention.register()
    if ranks is not None:
        # Importing transformers parts the ranks of a busy machine by seconds.
        set_agreement_timeout(dist.group.WORLD, 25.0)
    with dense_attention.float64_throughout():
        return _compare(ranks, name, case, layout, tokens, **more)


def _compare(
    ranks: list[int] | None, name: str, case: str, layout: str, tokens: int, **more: Any
) -> dict[str, float]:
    batch = make_batch(case, tokens)
    targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    count = int((targets != IGNORED).sum())
    whole = ARCHITECTURES[name].build(dense_attention.NAME).train()
    expected = whole_logits(whole, case, batch)
    whole_loss = cross_entropy(expected, targets) / count
    whole_loss.backward()

    model = ARCHITECTURES[name].build("eager").train()
    apply_ring_attention(model, ranks, layout=layout, **more)
    mine = shard_batch(model, batch)
    assert mine.pop("num_items") == count
    result = model(**mine, use_cache=False, num_items_in_batch=count)
    result.loss.backward()

    rows = mine["ring_sharding"].rows
    counts = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[:, rows].bool()
    error = (result.logits - expected[:, rows]).abs()[counts]
    loss = summed(result.loss.detach().double(), ranks)
    return {
        "logits": float(error.detach().max()) if error.numel() else 0.0,
        "loss": float((loss - whole_loss).detach().abs()),
        "gradients": gradient_error(model, whole, ranks),
    }


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def summed(x: Tensor, ranks: list[int] | None) -> Tensor:
    """The sum over the ranks, on each of them."""
    if ranks is None:
        return x
    parts: list[Any] = [None] * len(ranks)
    dist.all_gather_object(parts, x, group=group_of(ranks))
    return torch.stack(parts).sum(0)


def group_of(ranks: list[int]) -> Any:
    """A group of torch for these ranks, made by them alone."""
    from nnscaler_ring.core.ranks import groups

    return groups.group_of(groups.group_string(ranks))


def gradient_error(model: Any, whole: Any, ranks: list[int] | None) -> float:
    """The largest error of a parameter's gradient, summed over ranks, relative to its largest."""
    worst = 0.0
    for (name, p), expected in zip(model.named_parameters(), whole.parameters(), strict=True):
        got = summed(torch.zeros_like(p) if p.grad is None else p.grad, ranks)
        if expected.grad is None:
            assert not got.any(), name
            continue
        size = max(float(expected.grad.abs().max()), 1e-300)
        error = float((got - expected.grad).abs().max()) / size
        worst = max(worst, error if error == error else float("inf"))
    return worst
