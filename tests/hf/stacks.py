"""On two ranks: a sharded model inside what people train with, beside the unsharded model."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from nnscaler_ring import set_agreement_timeout
from nnscaler_ring.hf import apply_ring_attention, shard_batch
from tests.hf import dense_attention
from tests.hf.architectures import ARCHITECTURES
from tests.hf.comparison import IGNORED, cross_entropy, make_batch, summed, whole_logits

NON_REENTRANT = {"use_reentrant": False}


def expected_gradients(model: Any, case: str, batch: dict[str, Tensor]) -> list[Tensor]:
    """Of the unsharded model, for the parameters that want one."""
    targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    logits = whole_logits(model, case, batch)
    (cross_entropy(logits, targets) / (targets != IGNORED).sum()).backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


def backward(call: Callable[..., Any], model: Any, batch: dict[str, Tensor], scale: int) -> None:
    """One step's backward pass; `scale` undoes the averaging of gradients over ranks."""
    mine = shard_batch(model, batch)
    num_items = mine.pop("num_items")
    loss = call(**mine, use_cache=False, num_items_in_batch=num_items).loss
    (loss * scale).backward()


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error relative to the largest entry."""
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def lora(model: Any) -> Any:
    """Adapters with random weights on every linear layer; all else is frozen."""
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    adapted = get_peft_model(model, LoraConfig(**options)).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.2)
    return adapted


def train(ranks: list[int], stack: str, name: str, case: str, reentrant: bool | None) -> float:
    """The worst gradient error in a stack; `reentrant`: the kind of checkpointing, None: none."""
    dense_attention.register()
    set_agreement_timeout(dist.group.WORLD, 25.0)
    with dense_attention.float64_throughout():
        batch = make_batch(case)
        whole = ARCHITECTURES[name].build(dense_attention.NAME)
        model = ARCHITECTURES[name].build("eager")
        if stack == "lora":
            whole, model = lora(whole), lora(model)
        whole.train()
        model.train()
        expected = expected_gradients(whole, case, batch)
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        return worst(_gradients(ranks, stack, model, batch), expected)


def _gradients(ranks: list[int], stack: str, model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    mesh = init_device_mesh("cpu", (len(ranks),), mesh_dim_names=("cp",))["cp"]
    apply_ring_attention(model, mesh)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if stack == "fsdp2":
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        backward(model, model, batch, len(ranks))
        return [p.grad.full_tensor() for p in model.parameters()]
    if stack == "ddp":
        wrapped = DistributedDataParallel(model)
        backward(wrapped, wrapped, batch, len(ranks))
        return [p.grad for p in parameters]
    backward(model, model, batch, 1)
    return [summed(p.grad, ranks) for p in parameters]


def compiled(ranks: list[int], name: str, case: str, checkpointing: bool) -> float:
    """The worst gradient error of a model that is compiled whole, beside the same one eager."""
    set_agreement_timeout(dist.group.WORLD, 25.0)
    found = []
    for compiles in (False, True):
        model = ARCHITECTURES[name].build("eager").train()
        apply_ring_attention(model, ranks)
        if checkpointing:
            model.gradient_checkpointing_enable(NON_REENTRANT)
        torch.compiler.reset()
        call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiles else model
        backward(call, call, make_batch(case), 1)
        found.append([p.grad for p in model.parameters()])
    return worst(*found)


def dropout(ranks: list[int]) -> bool:
    """Whether checkpointing draws the same mask of attention dropout again."""
    set_agreement_timeout(dist.group.WORLD, 25.0)
    found = []
    for checkpointing in (False, True):
        model = ARCHITECTURES["llama"].build("eager", attention_dropout=0.3).train()
        apply_ring_attention(model, ranks)
        if checkpointing:
            model.gradient_checkpointing_enable(NON_REENTRANT)
        torch.manual_seed(5)
        backward(model, model, make_batch("dense"), 1)
        found.append([p.grad for p in model.parameters()])
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def autocast(ranks: list[int]) -> float:
    """The error of logits under autocast, relative to their norm; norms leave float32 queries."""
    dense_attention.register()
    set_agreement_timeout(dist.group.WORLD, 25.0)
    batch = {"input_ids": make_batch("dense")["input_ids"]}
    whole = ARCHITECTURES["qwen3"].build("sdpa", torch.float32)
    model = apply_ring_attention(ARCHITECTURES["qwen3"].build("eager", torch.float32), ranks)
    mine = shard_batch(model, batch)
    del mine["num_items"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = whole(**batch, use_cache=False).logits[:, mine["ring_sharding"].rows]
        found = model(**mine, use_cache=False).logits
    return float((found - expected).float().norm() / expected.float().norm())
