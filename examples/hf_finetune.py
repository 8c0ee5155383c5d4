"""Fine-tune a causal language model on documents that are too long for one device, and generate.

    torchrun --nproc-per-node 2 examples/hf_finetune.py
    torchrun --nproc-per-node 8 examples/hf_finetune.py --model Qwen/Qwen3-0.6B --text book.txt \
        --tokens 262144 --dtype bfloat16

Runs on GPUs where there are some, else on CPUs. Without --model a tiny model is built that reads
bytes. Documents are packed into one row of --tokens, which the ranks share: attention by
nnscaler_ring, weights and optimizer by FSDP2. A run that is started again goes on from the last
checkpoint in --out, also on another number of ranks.
"""

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from nnscaler_ring.hf import RingCache, apply_ring_attention, shard_batch

ROOT = Path(__file__).resolve().parent.parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a name or a folder; none: a tiny model of bytes")
    parser.add_argument(
        "--text", type=Path, nargs="+", default=sorted((ROOT / "docs").glob("*.md"))
    )
    parser.add_argument("--tokens", type=int, default=4096, help="of a step, over all ranks")
    parser.add_argument("--steps", type=int, default=10, help="in all, with those before")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--save-every", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("hf_finetune"))
    return parser.parse_args()


def load(args: argparse.Namespace) -> tuple[torch.nn.Module, object]:
    """The model and its tokenizer."""
    if args.model is not None:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
        return model, AutoTokenizer.from_pretrained(args.model)
    tokenizer = ByT5Tokenizer()  # a token is a byte: no file is needed
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)  # the same weights on every rank
    return LlamaForCausalLM(config).to(getattr(torch, args.dtype)), tokenizer


def packed_rows(documents: list[list[int]], tokens: int) -> Iterator[dict[str, torch.Tensor]]:
    """Rows of `tokens` tokens, document after document, over and over; the last is cut."""
    ids: list[int] = []
    positions: list[int] = []
    while True:
        for document in documents:
            ids += document
            positions += range(len(document))
            while len(ids) >= tokens:
                row, places = torch.tensor([ids[:tokens]]), torch.tensor([positions[:tokens]])
                labels = row.masked_fill(places == 0, -100)  # nobody predicts a document's start
                yield {"input_ids": row, "position_ids": places, "labels": labels}
                ids, positions = ids[tokens:], positions[tokens:]


def main() -> None:
    args = arguments()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(kind, (ranks,), mesh_dim_names=("cp",))

    model, tokenizer = load(args)
    model.to(kind)
    apply_ring_attention(model, mesh["cp"])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.base_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)

    texts = [path.read_text(encoding="utf-8") for path in args.text]
    rows = packed_rows([tokenizer(text).input_ids for text in texts], args.tokens)

    done = max((int(p.name) for p in args.out.glob("[0-9]*")), default=0)
    if done:
        weights, moments = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=args.out / str(done))
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    for _ in range(done):
        next(rows)

    model.train()
    for step in range(done + 1, args.steps + 1):
        start = time.perf_counter()
        batch = shard_batch(model, {k: v.to(kind) for k, v in next(rows).items()})
        num_items = batch.pop("num_items")
        loss = model(**batch, num_items_in_batch=num_items, use_cache=False).loss
        (loss * ranks).backward()  # FSDP2 averages gradients over the ranks; parts are summed
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        if rank == 0:
            rate = args.tokens / (time.perf_counter() - start)
            print(f"step {step}: loss {whole:.4f}, {rate:.0f} tokens/s{memory(kind)}", flush=True)
        if step % args.save_every == 0 or step == args.steps:
            weights, moments = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=args.out / str(step))

    model.eval()
    prompt = next(rows)["input_ids"][:, : args.tokens // 2].to(kind)
    cache = RingCache(model)
    cache.prefill(model, prompt)
    with torch.no_grad():
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            cache=cache,
            max_new_tokens=args.new_tokens,
            do_sample=False,
        )
    if rank == 0:
        print(f"after {prompt.shape[1]} tokens: {tokenizer.decode(tokens[0, prompt.shape[1] :])!r}")
    dist.destroy_process_group()


def memory(kind: str) -> str:
    return f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if kind == "cuda" else ""


if __name__ == "__main__":
    main()
