"""What a checkpoint holds of a model and its optimizer: tensors by name, and plain values.

Names are the model's own, without what DistributedDataParallel and torch.compile put in front.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nnscaler_ring.training.checkpoint_tensors import SavedTensors
from nnscaler_ring.training.plain_states import decode, encode

State = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by name, and JSON."""


def bare(model: nn.Module) -> nn.Module:
    """Find the model inside DistributedDataParallel and torch.compile.

    Raises:
        TypeError: FSDP1, whose parameters are pieces of flat ones.
    """
    while (inner := _inside(model)) is not None:
        model = inner
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise TypeError(
            "model must not be wrapped by FullyShardedDataParallel (FSDP1); shard it with FSDP2, "
            "for example by nnscaler_ring.training.shard_parameters."
        )
    return model


def _inside(model: nn.Module) -> nn.Module | None:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        inner: nn.Module = model.module
        return inner
    return dict(model.named_children()).get("_orig_mod")


def take_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Take everything of a model and its optimizer.

    Raises:
        TypeError: a value that no file without pickle can hold.
        ValueError: the optimizer has a parameter that the model has not.
    """
    tensors: dict[str, Tensor] = {}
    extra: dict[str, Any] = {}
    for name, value in bare(model).state_dict().items():
        if isinstance(value, Tensor):
            tensors[f"model.{name}"] = value
        else:
            extra[name] = encode(value, f"the model's {name}")
    names = parameter_names(model, optimizer)
    saved = optimizer.state_dict()
    states: dict[str, Any] = {}
    for number, values in saved["state"].items():
        name = names[number]
        states[name] = {}
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{key}"] = value
                states[name][key] = None
            else:
                states[name][key] = {"value": encode(value, f"the optimizer's {name}.{key}")}
    groups = [
        {
            "parameters": [names[number] for number in group["params"]],
            "options": encode(
                {key: value for key, value in group.items() if key != "params"},
                "an option of the optimizer",
            ),
        }
        for group in saved["param_groups"]
    ]
    return tensors, {"model": extra, "optimizer": {"states": states, "groups": groups}}


def check_state(
    plain: Mapping[str, Any],
    saved: SavedTensors,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Refuse a checkpoint of another model or optimizer before anything is changed.

    Raises:
        ValueError: the first difference, by name.
    """
    targets = {
        f"model.{name}": list(value.shape)
        for name, value in bare(model).state_dict().items()
        if isinstance(value, Tensor)
    }
    found = {n: entry["shape"] for n, entry in saved.index.items() if n.startswith("model.")}
    for name in sorted({*targets, *found}):
        if targets.get(name) != found.get(name):
            raise ValueError(
                f"{name} must have the same shape in the model and in the checkpoint, got "
                f"{targets.get(name, 'no such tensor')} and {found.get(name, 'no such tensor')}."
            )
    names = parameter_names(model, optimizer)
    current = optimizer.state_dict()["param_groups"]
    groups = [[names[number] for number in group["params"]] for group in current]
    in_file = [group["parameters"] for group in plain["optimizer"]["groups"]]
    if groups != in_file:
        raise ValueError(
            "optimizer must have the checkpoint's groups of parameters, in their order; it has "
            f"{[len(group) for group in groups]} parameters in its groups, the checkpoint "
            f"{[len(group) for group in in_file]}."
        )


def put_state(
    plain: Mapping[str, Any],
    saved: SavedTensors,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Put everything back where it was, once `check_state` has passed."""
    from torch.distributed.tensor import DTensor

    inner = bare(model)
    for name, target in inner.state_dict().items():
        if isinstance(target, Tensor):
            with torch.no_grad():
                target.copy_(saved.read_like(f"model.{name}", target))
    if plain["model"]:
        extra = {name: decode(value) for name, value in plain["model"].items()}
        inner.load_state_dict(extra, strict=False)
    parameters = dict(inner.named_parameters())
    names = parameter_names(model, optimizer)
    numbers = {name: number for number, name in names.items()}
    states: dict[int, dict[str, Any]] = {}
    for name, values in plain["optimizer"]["states"].items():
        state = states[numbers[name]] = {}
        for key, value in values.items():
            full = f"optimizer.{name}.{key}"
            parameter = parameters[name]
            if value is not None:
                state[key] = decode(value["value"])
            elif isinstance(parameter, DTensor) and saved.index[full]["shape"] == list(
                parameter.shape
            ):
                state[key] = saved.read_like(full, parameter)
            else:
                state[key] = saved.read_whole(full)
    current = optimizer.state_dict()["param_groups"]
    groups = [
        {**decode(group["options"]), "params": now["params"]}
        for group, now in zip(plain["optimizer"]["groups"], current, strict=True)
    ]
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """The name of each of the optimizer's parameters, by its number in `state_dict`.

    Raises:
        ValueError: the model has no such parameter.
    """
    names = {id(parameter): name for name, parameter in bare(model).named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in enumerate(parameters):
        if id(parameter) not in names:
            raise ValueError(
                f"optimizer must have the model's parameters alone; its number {number}, of shape "
                f"{list(parameter.shape)}, is none of them (was the model sharded, or moved, after "
                "the optimizer was made?)."
            )
    return {number: names[id(parameter)] for number, parameter in enumerate(parameters)}
