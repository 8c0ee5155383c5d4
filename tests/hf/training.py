"""Training with transformers' Trainer, sharded over the ranks or in one process."""

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from nnscaler_ring import set_agreement_timeout
from nnscaler_ring.hf import RingTrainerMixin, apply_ring_attention
from tests.hf import dense_attention
from tests.hf.architectures import ARCHITECTURES, VOCABULARY
from tests.hf.comparison import IGNORED

STEPS = 4
SAMPLES = 14
EVALUATED = 5  # an odd number: the last batch is smaller


class Samples(Dataset):
    """Sequences of different lengths, of which different numbers of labels count."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        length, ignored = torch.randint(0, 17, (2,), generator=generator).tolist()
        ids = torch.randint(3, VOCABULARY, (20 + length,), generator=generator)
        labels = ids.clone()
        labels[:ignored] = IGNORED
        return {"input_ids": ids, "labels": labels}


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pads on the right."""
    longest = max(len(sample["input_ids"]) for sample in samples)

    def padded(values: list[Tensor], fill: int) -> Tensor:
        pads = [torch.nn.functional.pad(x, (0, longest - len(x)), value=fill) for x in values]
        return torch.stack(pads)

    ids = [sample["input_ids"] for sample in samples]
    return {
        "input_ids": padded(ids, 0),
        "labels": padded([sample["labels"] for sample in samples], IGNORED),
        "attention_mask": padded([torch.ones_like(x) for x in ids], 0),
    }


class RingTrainer(RingTrainerMixin, Trainer):
    """What a user writes."""


def join_accelerate() -> None:
    """Tell accelerate, which reads the environment, of the ranks that are there already."""
    if dist.is_initialized():
        set_agreement_timeout(dist.group.WORLD, 25.0)
        rank, size = str(dist.get_rank()), str(dist.get_world_size())
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # read, and not used
    os.environ["ACCELERATE_USE_CPU"] = "1"


def arguments(folder: str, kind: type = TrainingArguments, **more: Any) -> Any:
    """SGD with clipping and checkpointing of activations."""
    options: dict[str, Any] = {
        **{"output_dir": folder, "use_cpu": True, "report_to": [], "disable_tqdm": True},
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        **{"per_device_eval_batch_size": 2, "prediction_loss_only": True},
        **{"max_steps": STEPS, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2},
        **{"learning_rate": 0.05, "lr_scheduler_type": "linear", "optim": "sgd"},
        **{"max_grad_norm": 1.0, "gradient_checkpointing": True},
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        **{"remove_unused_columns": False, "dataloader_pin_memory": False},
        **({"ddp_backend": "gloo"} if dist.is_initialized() else {}),
    }
    return kind(**{**options, **more})


def build(name: str, ranks: list[int] | None, sharded: bool) -> Any:
    """The model, in float32 as a Trainer would have it."""
    dense_attention.register()
    attention = "eager" if sharded else dense_attention.NAME
    model = ARCHITECTURES[name].build(attention, torch.float32)
    return apply_ring_attention(model, ranks) if sharded else model


def results(trainer: Any) -> dict[str, Any]:
    """Logged losses and gradient norms, and the weights."""
    history = trainer.state.log_history
    state = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    return {
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in history if "grad_norm" in entry],
        "weights": {k: v.detach().clone() for k, v in state.items()},
    }


def train(
    ranks: list[int] | None, name: str, folder: str, sharded: bool, **more: Any
) -> dict[str, Any]:
    """Trains, evaluates, and goes on from the checkpoint of step 2 with a new model."""
    join_accelerate()
    kind = RingTrainer if sharded else Trainer
    found: dict[str, Any] = {}
    for resumed in (False, True):
        trainer = kind(
            build(name, ranks, sharded),
            arguments(folder, **more),
            train_dataset=Samples(SAMPLES),
            eval_dataset=Samples(EVALUATED),
            data_collator=collate,
        )
        checkpoint = str(Path(folder) / "checkpoint-2") if resumed else None
        trainer.train(resume_from_checkpoint=checkpoint)
        found["resumed" if resumed else "trained"] = results(trainer)
    found["evaluation"] = trainer.evaluate()["eval_loss"]
    return found


class RingSFTTrainer(RingTrainerMixin, SFTTrainer):
    """What a user of TRL writes."""


def train_packed(ranks: list[int] | None, folder: str, sharded: bool) -> dict[str, Any]:
    """TRL's SFTTrainer on packed documents, over a model with a window."""
    join_accelerate()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 25, (24,), generator=generator).tolist()
    documents = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    kind = RingSFTTrainer if sharded else SFTTrainer
    packing = {"packing": True, "packing_strategy": "bfd", "max_length": 48}
    options = {**packing, "pad_to_multiple_of": 7, "eval_packing": True, "bf16": False}
    trainer = kind(
        build("mistral", ranks, sharded),
        arguments(folder, SFTConfig, gradient_accumulation_steps=1, **options),
        train_dataset=datasets.Dataset.from_list([{"input_ids": x} for x in documents]),
        eval_dataset=datasets.Dataset.from_list([{"input_ids": x} for x in documents[:9]]),
        processing_class=word_tokenizer(),
    )
    trainer.train()
    found = results(trainer)
    found["evaluation"] = trainer.evaluate()["eval_loss"]
    return found


def word_tokenizer() -> Any:
    """A tokenizer that no file is needed for: token n is the word "t<n>"."""
    words = {f"t{n}": n for n in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="t3")),
        **{"pad_token": "t0", "bos_token": "t1", "eos_token": "t2"},
    )


def train_in_groups(ranks: list[int], folder: str) -> dict[str, Any]:
    """Four ranks: two groups of two, each with its own samples."""
    join_accelerate()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    model = ARCHITECTURES["llama"].build("eager", torch.float32)
    apply_ring_attention(model, mesh["cp"])
    trainer = RingTrainer(
        model,
        arguments(folder, per_device_train_batch_size=1, per_device_eval_batch_size=1),
        train_dataset=Samples(SAMPLES),
        eval_dataset=Samples(EVALUATED),
        data_collator=collate,
    )
    trainer.train()
    return {**results(trainer), "evaluation": trainer.evaluate()["eval_loss"]}


def train_on_the_mesh_of_accelerate(ranks: list[int], name: str, folder: str) -> dict[str, Any]:
    """accelerate makes the groups and shares out the samples; on GPUs with FSDP2."""
    join_accelerate()
    # It refuses CPUs, for which nothing else is missing.
    with patch.object(ParallelismConfig, "_validate_accelerator", lambda self, accelerator: None):
        trainer = RingTrainer(
            ARCHITECTURES[name].build("eager", torch.float32),
            arguments(folder, parallelism_config=ParallelismConfig(cp_size=2)),
            train_dataset=Samples(SAMPLES),
            eval_dataset=Samples(EVALUATED),
            data_collator=collate,
        )
        trainer.train()
    return {**results(trainer), "evaluation": trainer.evaluate()["eval_loss"]}


def train_each_alone(ranks: list[int], folder: str) -> str:
    """Without use_cpu accelerate takes processes without GPUs for runs of their own."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    try:
        RingTrainer(build("llama", ranks, True), arguments(folder, use_cpu=False, ddp_backend=None))
    except ValueError as error:
        return str(error)
    return ""
