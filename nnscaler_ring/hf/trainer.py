"""`RingTrainerMixin`: transformers' Trainer, and its subclasses, over sharded sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler_ring.core.ranks.groups import find_place, group_of
from nnscaler_ring.hf.batch import shard_batch
from nnscaler_ring.hf.model import apply_ring_attention
from nnscaler_ring.hf.sharding import RingSettings, settings_of


class RingTrainerMixin:
    """Mixed into a Trainer, it gives the ranks of a group the same samples, and each its rows.

        class RingTrainer(RingTrainerMixin, Trainer): ...

        apply_ring_attention(model, process_group=mesh["cp"])
        RingTrainer(model, arguments, train_dataset=dataset).train()

    Works for `Trainer` and subclasses that keep its way through a step, such as TRL's `SFTTrainer`,
    packing included. The ranks that are not in one group are data parallel: groups must be equally
    large and hold every rank. Weights after a step, logged losses and gradient norms are those of
    one process that takes the groups' samples, whatever the accumulation and however the labels
    are spread.

    With `ParallelismConfig(cp_size=...)` in the arguments accelerate makes the groups; the model is
    then prepared here, with `ring_options`, unless it is already.

    Args:
        ring_options: keywords of `apply_ring_attention` for a model that accelerate's groups share.
        others: what the Trainer takes.

    Raises:
        ValueError: an argument that would make the sharded run another one; the message has the
            remedy.
    """

    model: Any
    args: Any
    accelerator: Any

    def __init__(
        self, *args: Any, ring_options: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        _check_arguments(self.args, kwargs)
        mesh_of_accelerate = _mesh_of(self.accelerator)
        if mesh_of_accelerate is not None:
            self._follow_accelerate(mesh_of_accelerate, ring_options or {})
        elif ring_options:
            raise ValueError(
                "ring_options are for a ParallelismConfig with cp_size, got none in the arguments; "
                "call apply_ring_attention(model, ...) instead."
            )
        self._ring = settings_of(self.model)
        self._groups = _all_groups(self._ring)
        if mesh_of_accelerate is None:
            mine = next(n for n, group in enumerate(self._groups) if _rank() in group)
            self.accelerator.prepare_data_loader = _prepare_data_loader(
                self.accelerator, len(self._groups), mine
            )

    def _follow_accelerate(self, mesh: Any, options: dict[str, Any]) -> None:
        """Let accelerate share out the samples, and keep its own context parallelism off."""
        try:
            found = settings_of(self.model)
        except ValueError:
            apply_ring_attention(self.model, mesh, **options)
        else:
            place, ranks = find_place(found.group), mesh.mesh.tolist()
            if [place.global_rank(n) for n in range(place.world_size)] != ranks:
                raise ValueError(
                    f"the model's process_group must be accelerate's, {ranks}, got another one; "
                    "leave apply_ring_attention to the trainer."
                )
        prepare = self.accelerator.prepare

        def prepare_without_hooks(*args: Any, **kwargs: Any) -> Any:
            # accelerate's hooks refuse every layer with a window, and are for torch's own ring.
            with patch("accelerate.accelerator._attach_context_parallel_hooks", lambda model: None):
                return prepare(*args, **kwargs)

        self.accelerator.prepare = prepare_without_hooks

    def _prepare_context_parallel_inputs(
        self, model: Any, inputs: dict[str, Any]
    ) -> tuple[Callable[[], Any], dict[str, Any]]:
        """The Trainer would cut the sequence for torch's own context parallelism."""
        return nullcontext, inputs

    def get_cp_size(self) -> int:
        """How many ranks see the same samples."""
        # The Trainer may ask while it is being made.
        return settings_of(self.model).world_size

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """The batches of one step, this rank's rows, and the labels that count, of all ranks."""
        batches, _ = super().get_batch_samples(  # type: ignore[misc]
            epoch_iterator, num_batches, device
        )
        shards = [shard_batch(self.model, batch) for batch in batches]
        if any("labels" not in shard for shard in shards):
            raise ValueError(
                f"batches must have labels, got {sorted(batches[0])}; use a collator that makes "
                "them (DataCollatorForLanguageModeling with mlm=False)."
            )
        count = torch.tensor([sum(shard.pop("num_items") for shard in shards)], device=device)
        everybody = self.accelerator.gather(count).sum()
        return shards, everybody // self._ring.world_size

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This rank's part of the loss while training; of whole batches, in evaluation, all of it.

        The parts are scaled as the Trainer does it, by the number of ranks that are averaged over.
        """
        step = super().compute_loss  # type: ignore[misc]
        if "ring_sharding" in inputs:
            return step(
                model,
                inputs,
                return_outputs=return_outputs,
                num_items_in_batch=num_items_in_batch,
            )
        if torch.is_grad_enabled():
            raise ValueError(
                "batches must come through get_batch_samples while training, got one of whole "
                "sequences; subclasses must not replace the Trainer's training loop."
            )
        mine = shard_batch(self.model, inputs)
        count = torch.tensor(mine.pop("num_items"), device=mine["position_ids"].device)
        with _gather_of(self.accelerator, None):
            result = step(model, mine, return_outputs=return_outputs, num_items_in_batch=count)
        loss = (result[0] if return_outputs else result).detach().clone()
        if self._ring.world_size > 1:
            dist.all_reduce(loss, group=group_of(self._ring.group))
        loss = loss / self.accelerator.num_processes
        return (loss, result[1]) if return_outputs else loss

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """The loss of a batch in evaluation; predictions are refused."""
        if not prediction_loss_only:
            raise NotImplementedError(
                "prediction_loss_only must be True: a rank has the predictions of its own rows "
                "alone; leave out compute_metrics, and use evaluate() for the loss."
            )
        return super().prediction_step(  # type: ignore[misc]
            model, inputs, prediction_loss_only, ignore_keys=ignore_keys
        )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, with a sample's loss counted once, not once for each of its ranks."""
        with _gather_of(self.accelerator, lambda found: _of_one_rank(found, self._groups)):
            return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]


def _check_arguments(args: Any, given: dict[str, Any]) -> None:
    """Refuse what would make another run of it, before anything is trained."""
    refused = {
        "average_tokens_across_devices=False": (
            not args.average_tokens_across_devices,
            "the loss would be a mean of shards, however many labels each has; leave it True",
        ),
        "label_smoothing_factor": (
            bool(args.label_smoothing_factor),
            "the Trainer's smoother would shift the labels of a shard once more; leave it 0",
        ),
        "neftune_noise_alpha": (
            bool(args.neftune_noise_alpha),
            "the noise depends on the length of the sequence, and a rank has a part; leave it None",
        ),
        "use_liger_kernel": (
            bool(args.use_liger_kernel),
            "its loss has not been compared over shards; leave it False",
        ),
        "compute_loss_func": (
            given.get("compute_loss_func") is not None,
            "it gets the labels of a shard, which are shifted already; override compute_loss",
        ),
        "dispatch_batches": (
            bool(getattr(args.accelerator_config, "dispatch_batches", None)),
            "one process would cut the samples for all ranks; leave it None",
        ),
    }
    for name, (is_set, reason) in refused.items():
        if is_set:
            raise ValueError(f"{name} is not supported over sharded sequences: {reason}.")
    if dist.is_initialized() and args.world_size != dist.get_world_size():
        raise ValueError(
            f"the arguments must know of all {dist.get_world_size()} ranks, got world_size="
            f"{args.world_size}: each would train alone; without GPUs pass use_cpu=True."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"every process must have one GPU, got {args.n_gpu} in one; start one process per GPU "
            "with torchrun."
        )


def _mesh_of(accelerator: Any) -> Any:
    """accelerate's mesh of the ranks that share a sequence, or None without cp_size."""
    config = getattr(accelerator, "parallelism_config", None)
    if config is None or not config.cp_enabled:
        return None
    return accelerator.torch_device_mesh["cp"]


def _all_groups(ring: RingSettings) -> list[tuple[int, ...]]:
    """The ranks of every group of the world.

    Raises:
        ValueError: they are of different sizes, or overlap.
    """
    if not dist.is_initialized():
        return [(0,)]
    place = find_place(ring.group)
    mine: tuple[int, ...] = (_rank(),)
    if place.group is not None:
        mine = tuple(sorted(place.global_rank(n) for n in range(place.world_size)))
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    groups = sorted(set(everybody))
    if len({len(group) for group in groups}) != 1 or len(sum(groups, ())) != len(everybody):
        raise ValueError(
            "the groups that share a sequence must be equally large and hold every rank once, got "
            f"{groups}; make them with init_device_mesh(..., (dp, cp), "
            "mesh_dim_names=('dp', 'cp'))['cp']."
        )
    return groups


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _prepare_data_loader(accelerator: Any, count: int, index: int) -> Callable[..., Any]:
    """What replaces `Accelerator.prepare_data_loader`: every group is one taker of samples."""
    from accelerate.data_loader import prepare_data_loader

    def prepare(
        data_loader: Any, device_placement: bool | None = None, slice_fn_for_dispatch: Any = None
    ) -> Any:
        if getattr(data_loader, "_is_accelerate_prepared", False):
            return data_loader
        config = accelerator.dataloader_config
        prepared = prepare_data_loader(
            data_loader,
            accelerator.device,
            num_processes=count,
            process_index=index,
            split_batches=config.split_batches,
            put_on_device=(
                accelerator.device_placement if device_placement is None else device_placement
            ),
            rng_types=accelerator.rng_types.copy(),
            dispatch_batches=False,
            even_batches=config.even_batches,
            use_seedable_sampler=config.use_seedable_sampler,
            data_seed=config.data_seed,
            non_blocking=config.non_blocking,
            use_stateful_dataloader=config.use_stateful_dataloader,
        )
        accelerator._dataloaders.append(prepared)
        return prepared

    return prepare


@contextmanager
def _gather_of(accelerator: Any, choose: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
    """Inside, `accelerator.gather` returns what `choose` makes of its result; None: the result."""
    before = vars(accelerator).get("gather")
    gather = type(accelerator).gather
    if choose is None:
        vars(accelerator).pop("gather", None)
    else:
        accelerator.gather = lambda tensor: choose(gather(accelerator, tensor))
    try:
        yield
    finally:
        vars(accelerator).pop("gather", None)
        if before is not None:
            accelerator.gather = before


def _of_one_rank(everything: Any, groups: list[tuple[int, ...]]) -> Any:
    """Of values gathered from all ranks, those of one rank of every group."""
    if len(groups[0]) == 1 or not isinstance(everything, Tensor):
        return everything
    by_rank = everything.unflatten(0, (dist.get_world_size(), -1))
    return torch.cat([by_rank[group[0]] for group in groups])
