"""Modules made with a ProcessGroup are copied and saved like any other module."""

import copy
import io

import torch
import torch.distributed as dist
from torch import nn

from tests.models.test_autocast import MODELS, TOKENS, build


def copies(ranks):
    """For each model: whether copies share its group, and the largest difference of results."""
    found = {}
    world = dist.group.WORLD
    block = ranks.index(dist.get_rank())
    rows = slice(block * TOKENS // len(ranks), (block + 1) * TOKENS // len(ranks))
    lens = [(b + 1) * TOKENS // len(ranks) - b * TOKENS // len(ranks) for b in range(len(ranks))]
    for name in MODELS:
        model = nn.Sequential(build(name, world))
        saved = io.BytesIO()
        torch.save(model, saved)
        saved.seek(0)
        others = [copy.deepcopy(model), torch.load(saved, weights_only=False)]
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(1, TOKENS, 16, generator=generator)[:, rows]
        if name in ("Transformer", "RingTransformer"):
            x = torch.randint(11, (1, TOKENS), generator=generator)[:, rows]

        def call(sequential, x=x):
            out = sequential[0](x, shard_lens=lens)
            return out[0] if isinstance(out, tuple) else out

        expected = call(model)
        groups = [
            module.process_group is world
            for other in others
            for module in other.modules()
            if hasattr(module, "process_group")
        ]
        difference = max((call(other) - expected).abs().max().item() for other in others)
        weights = {id(p) for p in model.parameters()}
        apart = not any(id(p) in weights for other in others for p in other.parameters())
        found[name] = all(groups) and len(groups) >= 2, difference, apart
    return found


def test_copies_share_the_group(pool):
    for found in pool.run(pool.size, copies):
        for name, (same_group, difference, apart) in found.items():
            assert same_group and apart, name
            assert difference == 0, name


def test_ranks_where_there_is_no_such_group():
    """A module that is loaded elsewhere has the ranks of its group."""
    from nnscaler_ring.core.ranks.kept_group import _find

    assert _find("gone", (0, 2)).group == [0, 2]
    model = build("RingAttention", None)
    assert copy.deepcopy(model).process_group is None
