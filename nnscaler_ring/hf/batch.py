"""`shard_batch`: a batch of whole sequences becomes this rank's part of it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nnscaler_ring.core.plan.layout import LAYOUTS
from nnscaler_ring.core.plan.span import even_lens
from nnscaler_ring.core.ranks.groups import find_place, group_of
from nnscaler_ring.core.token_index import token_index
from nnscaler_ring.hf.sharding import RingSettings, Sharding, settings_of

IGNORED = -100
"""The label of tokens that do not count."""

CUT = ("input_ids", "inputs_embeds", "labels", "shift_labels", "position_ids", "seq_idx")
"""Tensors with the tokens in their second dimension, of which a rank gets its rows."""

READ = ("attention_mask", "token_type_ids", "cu_seq_lens_q", "cu_seq_lens_k")
READ_NUMBERS = ("max_length_q", "max_length_k")
"""What shard_batch reads and takes off: the sharding says it."""

REFUSED = (
    "logits_to_keep",
    "output_attentions",
    "output_router_logits",
    "past_key_values",
    "cache",
)
"""What a model would understand of its own shard alone."""


def shard_batch(
    model: nn.Module, batch: Mapping[str, Any], *, compare: bool = True
) -> dict[str, Any]:
    """This rank's part of a batch that all ranks of the model's group pass alike.

    The parts together are the batch: the sum over ranks of the losses is the loss of the whole
    batch, and so are the sums of gradients. Labels are shifted here, over the whole sequence, so
    that no target is lost where it is cut.

        batch = shard_batch(model, batch)
        num_items = batch.pop("num_items")
        loss = model(**batch, num_items_in_batch=num_items).loss

    Args:
        model: prepared by `apply_ring_attention`, wrapped or not.
        batch: whole sequences, the same on every rank: `input_ids` [batch, tokens] or
            `inputs_embeds` [batch, tokens, hidden]; optional `labels` or `shift_labels`,
            `position_ids`, `attention_mask` [batch, tokens] that pads on the right. Packed
            documents: `position_ids` that begin again, or `cu_seq_lens_q` and `cu_seq_lens_k`
            with one row. Other tensors must not have a dimension of as many tokens.
        compare: whether the ranks compare what they pass, one small collective; False where they
            are known to pass the same.

    Returns:
        the batch to call the model with, and beside it `num_items`: the labels that count, of all
        ranks, to be popped.

    Raises:
        ValueError: a batch that cannot be cut, that is cut already, or that differs between ranks.
    """
    settings = settings_of(model)
    try:
        found = _shard(settings, batch)
        error = None
    except (ValueError, TypeError, NotImplementedError) as refusal:
        found, error = {}, refusal
    if compare and settings.world_size > 1:
        _compare(settings, _digest(batch) if error is None else "", error)
    if error is not None:
        raise error
    return found


def _shard(settings: RingSettings, batch: Mapping[str, Any]) -> dict[str, Any]:
    tokens = _check_batch(batch)
    size, total = tokens.shape[:2]
    position_ids = batch.get("position_ids")
    cu_seqlens = _documents(batch, size, total)
    if position_ids is None:
        position_ids = _positions(cu_seqlens, size, total).to(tokens.device)
    shift_labels = _shift_labels(batch)
    sharding = _sharding(settings, cu_seqlens, total, position_ids)
    rows = sharding.rows.to(tokens.device)

    found = {k: v for k, v in batch.items() if k not in (*CUT, *READ, *READ_NUMBERS)}
    for name in ("input_ids", "inputs_embeds", "seq_idx"):
        if batch.get(name) is not None:
            found[name] = batch[name].index_select(1, rows)
    found["position_ids"] = position_ids.index_select(1, rows)
    num_items = 0
    if shift_labels is not None:
        num_items = int((shift_labels != IGNORED).sum())
        found["labels"] = found["shift_labels"] = shift_labels.index_select(1, rows)
    found["ring_sharding"] = sharding
    found["num_items"] = num_items
    return found


def _sharding(
    settings: RingSettings,
    cu_seqlens: list[list[int]] | None,
    total: int,
    position_ids: Tensor,
) -> Sharding:
    name = settings.layout if cu_seqlens is None else settings.packed_layout
    place = find_place(settings.group)
    ranks = place.world_size
    if total < ranks:
        raise ValueError(
            f"batch must have a token for each of the {ranks} ranks, got {total}: transformers' "
            "masks do not take an empty shard; pad on the right, or use fewer ranks."
        )
    documents = None if cu_seqlens is None else cu_seqlens[0]
    if name == "folded" and cu_seqlens is not None and cu_seqlens != [documents] * len(cu_seqlens):
        raise ValueError(
            "batch must hold one packed sequence, or the same documents in every row, with "
            f"packed_layout='folded', got {len(cu_seqlens)} rows with documents of their own, "
            "whose tokens would go to different ranks. Pack them into one row "
            "(DataCollatorWithFlattening), or use packed_layout='contiguous'."
        )
    layout = LAYOUTS[name].for_shards(even_lens(total, ranks), documents)
    return Sharding(
        layout=name,
        shard_lens=tuple(layout.shard_lens),
        rows=token_index(layout.positions(place.block)),
        cu_seqlens=None if cu_seqlens is None else tuple(map(_tensor, cu_seqlens)),
        last_position=int(position_ids.max()),
    )


def _check_batch(batch: Mapping[str, Any]) -> Tensor:
    """The tensor that says how many sequences and tokens there are, once all of it is right."""
    if "ring_sharding" in batch:
        raise ValueError("batch must be of whole sequences, got one that is sharded already.")
    given = [name for name in ("input_ids", "inputs_embeds") if batch.get(name) is not None]
    if len(given) != 1:
        raise ValueError(f"batch must have input_ids or inputs_embeds, got {sorted(batch)}.")
    tokens: Tensor = batch[given[0]]
    if tokens.dim() != (2 if given[0] == "input_ids" else 3) or tokens.shape[1] == 0:
        raise ValueError(
            f"{given[0]} must be [batch, tokens] or [batch, tokens, hidden] with a token, got "
            f"shape {list(tokens.shape)}."
        )
    for name, value in batch.items():
        if name in REFUSED and value is not None and value is not False:
            raise ValueError(
                f"{name} must not be in a batch that is sharded, got {value!r}: the model would "
                "apply it to each shard alone; leave it out."
            )
        if isinstance(value, Tensor):
            _check_tensor(name, value, tokens)
    return tokens


def _check_tensor(name: str, value: Tensor, tokens: Tensor) -> None:
    size, total = tokens.shape[:2]
    if name == "attention_mask" and value.dim() != 2:
        raise ValueError(
            f"attention_mask must be [batch, tokens], got {list(value.shape)}: masks of four "
            "dimensions are not supported; pad on the right, or pack the batch."
        )
    if name in (*CUT, "attention_mask", "token_type_ids"):
        if value.shape[:2] != (size, total) and not (
            name == "position_ids" and value.shape == (1, total)
        ):
            raise ValueError(
                f"{name} must be [batch, tokens] = [{size}, {total}], got {list(value.shape)}."
            )
        if name == "token_type_ids" and bool(value.any()):
            raise ValueError(
                "token_type_ids must be 0: tokens of other types see each other in blocks."
            )
    elif name not in READ and total in value.shape and value.dim() > (1 if size == total else 0):
        raise ValueError(
            f"{name} {list(value.shape)} has a dimension of {total} tokens, and shard_batch does "
            f"not know how to cut it; it knows {', '.join((*CUT, *READ))}. Take it out, or pass "
            "this rank's part yourself: the rows in ring_sharding.rows."
        )


def _documents(batch: Mapping[str, Any], size: int, total: int) -> list[list[int]] | None:
    """Where documents begin in every row, and the total; None where a row is one document."""
    mask = batch.get("attention_mask")
    if mask is not None:
        _check_padding(mask, batch)
    bounds = [batch.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k")]
    if any(b is not None for b in bounds):
        return [_given_documents(bounds, size, total)]
    position_ids = batch.get("position_ids")
    if position_ids is None:
        return None
    # A document begins where positions do not go on; the first one may begin anywhere.
    begins = (position_ids[:, 1:] - position_ids[:, :-1]) != 1
    if mask is not None:
        begins = begins & mask[:, 1:].bool()  # positions of padding may be anything
    if not bool(begins.any()):
        return None
    rows = begins.expand(size, total - 1) if len(begins) == 1 else begins
    return [[0, *(row.nonzero().flatten() + 1).tolist(), total] for row in rows]


def _given_documents(bounds: list[Any], size: int, total: int) -> list[int]:
    if any(b is None for b in bounds) or bounds[0].tolist() != bounds[1].tolist():
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k must both be there, and the same.")
    found: list[int] = bounds[0].tolist()
    if size != 1 or found[:1] != [0] or found[-1] != total or sorted(found) != found:
        raise ValueError(
            f"cu_seq_lens_q must rise from 0 to the {total} tokens of one row, got {found} for "
            f"{size} rows; flatten the rows into one."
        )
    return found


def _check_padding(mask: Tensor, batch: Mapping[str, Any]) -> None:
    seen = mask.bool()
    if bool((seen[:, 1:] & ~seen[:, :-1]).any()):
        raise ValueError(
            "attention_mask must pad on the right, got padding before a token; set "
            "tokenizer.padding_side = 'right', or pack the batch (DataCollatorWithFlattening)."
        )
    labels = batch.get("labels")
    if labels is not None and bool((labels[~seen] != IGNORED).any()):
        raise ValueError(
            f"labels must be {IGNORED} where attention_mask is 0; use "
            f"labels.masked_fill(attention_mask == 0, {IGNORED})."
        )


def _shift_labels(batch: Mapping[str, Any]) -> Tensor | None:
    """Every token's target: the label of the next one."""
    shifted, labels = batch.get("shift_labels"), batch.get("labels")
    if shifted is not None:
        return shifted
    if labels is None:
        return None
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def _positions(cu_seqlens: list[list[int]] | None, size: int, total: int) -> Tensor:
    if cu_seqlens is None:
        return torch.arange(total).expand(size, total)
    rows = [torch.cat([torch.arange(b - a) for a, b in pairwise(row)]) for row in cu_seqlens]
    return torch.stack(rows)


def _tensor(bounds: list[int]) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


def _digest(batch: Mapping[str, Any]) -> str:
    """A short text that differs where batches differ: shapes, and sums that depend on the order."""
    parts = []
    for name in ("input_ids", "inputs_embeds", "labels", "shift_labels", "position_ids"):
        value = batch.get(name)
        if value is None:
            continue
        text = f"{name} {list(value.shape)}"
        if not value.is_floating_point():
            flat = value.flatten().to(torch.int64)
            place = torch.arange(1, len(flat) + 1, device=flat.device)
            text += f" {int((flat * (place * 0x9E3779B97F4A7C1 ^ place)).sum()):x}"
        parts.append(text)
    return "; ".join(parts)


def _compare(settings: RingSettings, digest: str, error: Exception | None) -> None:
    """Raises where ranks pass different batches, or another rank has refused its own."""
    place = find_place(settings.group)
    mine = (digest, None if error is None else str(error))
    everybody: list[Any] = [None] * place.world_size
    dist.all_gather_object(everybody, mine, group=group_of(settings.group))
    if error is not None:
        return
    for block, member in enumerate(place.members):
        theirs, refusal = everybody[member]
        if refusal is not None:
            raise ValueError(f"rank {place.global_rank(block)} refused its batch: {refusal}")
        if theirs != digest:
            raise ValueError(
                "batch must be the same on all ranks that share a sequence, got on rank "
                f"{place.global_rank(place.block)} {digest!r}, on rank {place.global_rank(block)} "
                f"{theirs!r}; give the ranks of one group the same samples (RingTrainerMixin "
                "does), and only groups different ones."
            )
