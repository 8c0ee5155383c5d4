"""transformers' Trainer over sequences that the ranks share: two lines more than without.

torchrun --nproc-per-node 2 examples/hf_trainer.py
"""

from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import ByT5Tokenizer as Tokenizer
from transformers import DataCollatorForLanguageModeling as Collator
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from nnscaler_ring.hf import RingTrainerMixin, apply_ring_attention

OUT = "hf_trainer"
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


class RingTrainer(RingTrainerMixin, Trainer):
    pass


def main() -> None:
    on_cpu = not torch.cuda.is_available()
    args = TrainingArguments(OUT, max_steps=5, gradient_accumulation_steps=2, use_cpu=on_cpu)
    tokenizer = Tokenizer()
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), intermediate_size=128, **SMALL))
    apply_ring_attention(model, range(dist.get_world_size()))
    texts = [p.read_text() for p in Path(__file__).parents[1].glob("docs/*.md")]
    dataset = Dataset.from_list([{"input_ids": tokenizer(x[:1000]).input_ids} for x in texts])
    collator = Collator(tokenizer, mlm=False)
    RingTrainer(model, args, train_dataset=dataset, data_collator=collator).train()


if __name__ == "__main__":
    main()
