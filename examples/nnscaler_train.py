"""Train a byte-level transformer whose sequence nnScaler shards over all ranks.

    torchrun --nproc-per-node 2 examples/nnscaler_train.py      # CPU ranks, or GPUs where there are

The model is written for one device. `parallelize()` with `shard_sequence` gives every rank
tokens / N of every layer; only attention communicates. The text is Python's standard library. At
the end rank 0 repeats the training on one device and compares the losses.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import nnscaler
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nnscaler_ring import wrap_zigzag_attn_func
from nnscaler_ring.cpu_runtime import nnscaler_on_cpu
from nnscaler_ring.policies import shard_sequence


@dataclass(frozen=True)
class Config:
    """Small enough for two CPU cores and a minute."""

    tokens: int = 512  # a page of code; must divide by the ranks
    batch: int = 2
    layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2  # grouped heads halve what attention sends
    head_dim: int = 16
    hidden: int = 128
    vocabulary: int = 256  # bytes
    steps: int = 30
    lr: float = 3e-3


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self.attention_norm, self.mlp_norm = RMSNorm(width), RMSNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(width, kv_width, bias=False)
        self.to_v = nn.Linear(width, kv_width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, config.hidden, bias=False)
        self.up = nn.Linear(width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # Sizes come from the configuration: reading x.shape would make nnScaler gather x.
        c = self.config
        y = self.attention_norm(x)
        q = self.to_q(y).view(-1, c.tokens, c.num_heads, c.head_dim)
        k = self.to_k(y).view(-1, c.tokens, c.num_kv_heads, c.head_dim)
        v = self.to_v(y).view(-1, c.tokens, c.num_kv_heads, c.head_dim)
        x = x + self.to_out(wrap_zigzag_attn_func(q, k, v).flatten(2))
        y = self.mlp_norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class ByteModel(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.num_heads * config.head_dim
        self.embedding = nn.Embedding(config.vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, config.tokens, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, config.vocabulary, bias=False)
        self.scale = 1 / (config.batch * config.tokens)

    def forward(self, text: Tensor, following: Tensor) -> Tensor:
        x = self.embedding(text) + self.positions
        for block in self.blocks:
            x = block(x)
        log_probabilities = nn.functional.log_softmax(self.head(self.norm(x)), dim=-1)
        # One loss per token, then their sum: reduction="mean" would make nnScaler gather.
        losses = nn.functional.nll_loss(
            log_probabilities.transpose(1, 2), following, reduction="none"
        )
        return losses.sum() * self.scale


def make_model(config: Config) -> ByteModel:
    torch.manual_seed(0)
    return ByteModel(config)


def batches(config: Config) -> list[tuple[Tensor, Tensor]]:
    """Random pieces of the standard library and the bytes that follow, the same on all ranks."""
    folder = Path(os.__file__).parent
    text = b"".join((folder / name).read_bytes() for name in ("argparse.py", "typing.py"))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    chosen = []
    for _ in range(config.steps):
        starts = torch.randint(len(data) - config.tokens, (config.batch,), generator=generator)
        pieces = torch.stack([data[s : s + config.tokens + 1] for s in starts])
        chosen.append((pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()))
    return chosen


def train(model: nn.Module, optimizer: torch.optim.Optimizer, config: Config) -> list[float]:
    device = next(model.parameters()).device
    losses = []
    for text, following in batches(config):
        loss = model(text.to(device), following.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def one_device_losses(config: Config, cpu: bool) -> list[float]:
    model = make_model(config).to("cpu" if cpu else "cuda")
    return train(model, torch.optim.AdamW(model.parameters(), lr=config.lr), config)


def report(losses: list[float], expected: list[float], config: Config, world_size: int) -> None:
    print(f"{world_size} ranks, {config.tokens // world_size} of {config.tokens} tokens each")
    for step in range(0, config.steps, max(1, config.steps // 5)):
        print(f"step {step:3d}: {losses[step]:.4f} nats per byte")
    worst = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    print(f"last step: {losses[-1]:.4f}; largest difference to one device: {worst:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=Config.steps)
    parser.add_argument("--tokens", type=int, default=Config.tokens)
    arguments = parser.parse_args()
    config = Config(steps=arguments.steps, tokens=arguments.tokens)
    cpu = not torch.cuda.is_available()
    with nnscaler_on_cpu() if cpu else contextlib.nullcontext():
        nnscaler.init()
        rank, world_size = dist.get_rank(), dist.get_world_size()
        folder = [tempfile.mkdtemp()]  # of rank 0: nnScaler's code must be where all ranks read
        dist.broadcast_object_list(folder)
        text, following = batches(config)[0]
        model = nnscaler.parallelize(
            make_model(config),
            {"text": text, "following": following},
            shard_sequence,
            nnscaler.ComputeConfig(world_size, world_size, trace_strategy="cpu"),
            gen_savedir=folder[0],
        )
        if not cpu:
            model.cuda()
        optimizer = nnscaler.build_optimizer(model, torch.optim.AdamW, lr=config.lr)
        losses = train(model, optimizer, config)
        if rank == 0:
            report(losses, one_device_losses(config, cpu), config, world_size)
        dist.barrier()


if __name__ == "__main__":
    main()
