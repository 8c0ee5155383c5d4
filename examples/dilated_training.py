"""Train a RingTransformer with its sequence shared by all ranks, and survive failures.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    torchrun --nproc-per-node 2 --max-restarts 3 examples/dilated_training.py --folder runs/dilated

The variable gives every restart a store of its own: else torchrun keeps one, and the new ranks may
read the addresses of dead ones there (torch 2.13).

Parameters are sharded by FSDP2 over the same ranks. Every few steps the run is saved; when a rank
dies, torchrun starts all of them again, and they go on from the last checkpoint, bit for bit.
`--fail-at 7` ends rank 1 after 7 steps, once, to see that. The text is Python's standard library.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from nnscaler_ring.dilated import RingTransformer, TrainingCheckpoints
from nnscaler_ring.dilated.ring_transformer import next_token_loss, next_tokens
from nnscaler_ring.models import even_shard_lens
from nnscaler_ring.training import shard_parameters


@dataclass(frozen=True)
class Config:
    """Small enough for two CPU cores and a minute."""

    tokens: int = 501  # of the whole sequence; need not divide by the ranks
    batch: int = 2
    embed_dim: int = 64
    num_heads: int = 4
    num_layers: int = 2
    segment_lengths: tuple[int, ...] = (32, 128, 512)  # the last spans all shards
    dilation_rates: tuple[int, ...] = (1, 2, 4)
    vocabulary: int = 256  # bytes
    lr: float = 3e-3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/dilated"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--checkpoint-interval", type=int, default=5)
    parser.add_argument("--fail-at", type=int, default=None, help="end rank 1 after this step")
    return parser.parse_args()


def batch_of(text: Tensor, config: Config) -> Tensor:
    """The same random pieces of the text on every rank."""
    starts = torch.randint(len(text) - config.tokens, (config.batch,)).tolist()
    return torch.stack([text[start : start + config.tokens] for start in starts]).long()


def fail_once(folder: Path) -> None:
    marker = folder / "failed"
    if dist.get_rank() == 1 and not marker.exists():
        marker.touch()
        os._exit(1)


def main() -> None:
    given, config = arguments(), Config()
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    world_size = int(os.environ["WORLD_SIZE"])
    mesh = init_device_mesh(device_type, (world_size,), mesh_dim_names=("sequence",))
    device = torch.device(
        device_type, int(os.environ["LOCAL_RANK"]) if device_type == "cuda" else 0
    )
    torch.manual_seed(0)  # the same weights and the same batches on every rank
    model = RingTransformer(
        config.vocabulary,
        config.embed_dim,
        config.num_heads,
        config.num_layers,
        max_seq_len=config.tokens,
        segment_lengths=config.segment_lengths,
        dilation_rates=config.dilation_rates,
        process_group=mesh,
    ).to(device)
    for module in (*model.layers, model):
        shard_parameters(module, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    given.folder.mkdir(parents=True, exist_ok=True)
    checkpoints = TrainingCheckpoints(
        given.folder, model, optimizer, interval=given.checkpoint_interval
    )
    text = torch.frombuffer(bytearray(inspect.getsource(inspect), "utf-8"), dtype=torch.uint8)
    lens = even_shard_lens(config.tokens, mesh)
    start = sum(lens[: mesh.get_local_rank()])
    rows = slice(start, start + lens[mesh.get_local_rank()])
    for step in range(checkpoints.resume() + 1, given.steps + 1):
        ids = batch_of(text, config)[:, rows].to(device)
        labels = next_tokens(ids, mesh, lens)
        loss = next_token_loss(model(ids, lens), labels, config.batch * (config.tokens - 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            print(f"step {step}: loss {total.item():.4f}", flush=True)
            with (given.folder / "losses.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "loss": total.item()}) + "\n")
        checkpoints.after_step(step)
        if step == given.fail_at:
            fail_once(given.folder)
    dist.barrier()  # nobody leaves while others still talk to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
