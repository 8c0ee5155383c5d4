"""The same training under nnScaler: one device's model, and a plan that shards its sequence."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.optim import AdamW

from nnscaler_ring.cpu_runtime import nnscaler_on_cpu
from nnscaler_ring.policies import shard_sequence
from nnscaler_ring.tools.demo.model import Decoder
from nnscaler_ring.tools.demo.shard import Split
from nnscaler_ring.tools.demo.text import Corpus
from nnscaler_ring.tools.demo.train import TrainConfig, Training
from nnscaler_ring.tools.launch import Rank, check_ranks, torchrun_environment


class NnScalerTraining(Training):
    """All ranks are given whole sequences; nnScaler's code takes shares and sums gradients."""

    def __init__(self, rank: Rank, config: TrainConfig, corpus: Corpus, dtype: torch.dtype) -> None:
        super().__init__(rank, config, corpus, dtype)
        self.peers = rank.group

    @staticmethod
    def check(ranks: int, device: str, tokens: int) -> None:
        """Whether nnScaler is here, and can share such sequences equally on this device."""
        check_ranks(ranks, device)
        if importlib.util.find_spec("nnscaler") is None:
            raise ValueError(
                "engine nnscaler needs nnScaler, which is not installed and not on PyPI: pip "
                "install its wheel, and regex, as docs/nnscaler.md says; or use engine torch."
            )
        if device == "cpu" and torch.cuda.is_available():
            raise ValueError(
                "device must be cuda with engine nnscaler where CUDA is available, got cpu: "
                "nnScaler computes there; set CUDA_VISIBLE_DEVICES='' to try it on the CPU."
            )
        if tokens % ranks:
            raise ValueError(
                f"tokens must divide by the ranks with engine nnscaler, got {tokens} tokens and "
                f"{ranks} ranks: its shards are all equal; use {tokens // ranks * ranks or ranks} "
                "tokens, or engine torch."
            )

    @staticmethod
    @contextmanager
    def session(rank: Rank) -> Iterator[None]:
        """nnScaler as under torchrun, on the CPU where that is asked for."""
        os.environ.update(torchrun_environment(rank.rank, rank.world_size))
        # Its warnings are of arguments that one op leaves unused; the screen is for the losses.
        logging.getLogger("nnscaler").setLevel(logging.ERROR)
        with nnscaler_on_cpu() if rank.device.type == "cpu" else nullcontext():
            import nnscaler

            nnscaler.init()
            yield

    @staticmethod
    def attention_split(op: str, tokens: int, group: list[int]) -> Split:
        """nnScaler's shards are contiguous."""
        return Split(op, tokens, group, in_zigzag_order=False)

    def place(self, decoder: Decoder) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Rank 0 generates the code, once for each dtype; all ranks load their part of it."""
        import nnscaler

        ranks = self.rank.world_size
        model = nnscaler.parallelize(
            decoder,
            {name: x.cpu() for name, x in self.batch(self.sample(0)).items()},
            shard_sequence,
            nnscaler.ComputeConfig(ranks, ranks, trace_strategy="cpu"),
            gen_savedir=self.rank.folder / "nnscaler",
            instance_name=f"{self.config.op}_{str(self.dtype).removeprefix('torch.')}",
        )
        if self.rank.device.type == "cuda":
            model.cuda()
        return model, nnscaler.build_optimizer(model, AdamW, lr=self.config.learning_rate)
