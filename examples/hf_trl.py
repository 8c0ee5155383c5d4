"""TRL's SFTTrainer with packing, over sequences that the ranks share.

torchrun --nproc-per-node 2 examples/hf_trl.py
"""

from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import ByT5Tokenizer as Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from nnscaler_ring.hf import RingTrainerMixin, apply_ring_attention

OUT = "hf_trl"
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


class RingSFTTrainer(RingTrainerMixin, SFTTrainer):
    pass


def main() -> None:
    on_cpu = not torch.cuda.is_available()
    args = SFTConfig(OUT, max_steps=5, packing=True, max_length=2048, use_cpu=on_cpu, bf16=False)
    tokenizer = Tokenizer()
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), intermediate_size=128, **SMALL))
    apply_ring_attention(model, range(dist.get_world_size()))
    texts = [p.read_text() for p in Path(__file__).parents[1].glob("docs/*.md")]
    dataset = Dataset.from_list([{"input_ids": tokenizer(x[:1000]).input_ids} for x in texts])
    RingSFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer).train()


if __name__ == "__main__":
    main()
