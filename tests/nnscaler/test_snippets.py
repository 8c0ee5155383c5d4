"""The snippets of README and docs that nnScaler runs: as printed, and nothing is gathered."""

import importlib.util
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnscaler_ring import wrap_zigzag_attn_func
from nnscaler_ring.models import Transformer, TransformerConfig
from tests.nnscaler.runtime import generated_code, nnscaler_ranks, shared_folder
from tests.ranks import RankPool

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SNIPPETS = [
    pytest.param(snippet, id=f"{page.name}, {number}")
    for page in PAGES
    for number, snippet in enumerate(CODE.findall(page.read_text()), start=1)
    if "parallelize(" in snippet
]
TOKENS, VOCABULARY = 24, 11
SIZES = {"width": 8, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "hidden": 8}


class UserModel(nn.Module):
    """A model of the reader's, for one device, that ends in its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        heads = self.embedding(ids).view(-1, TOKENS, 4, 4)
        x = wrap_zigzag_attn_func(heads, heads, heads).flatten(2)
        log_probabilities = nn.functional.log_softmax(self.head(x), dim=-1)
        return nn.functional.nll_loss(
            log_probabilities.transpose(1, 2), labels, reduction="none"
        ).sum()


def run(ranks: list[int], snippet: str) -> tuple[list[str], str]:
    """Warnings while the snippet runs on ranks, and the code that nnScaler generates."""
    warnings: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())

    ids = torch.randint(VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model: nn.Module = UserModel()
    if "positions" in snippet:
        model = Transformer(TransformerConfig(VOCABULARY, **SIZES))
    with nnscaler_ranks() as nnscaler:
        folder = shared_folder()
        given: dict[str, Any] = {
            "nnscaler": nnscaler,
            "model": model,
            "ids": ids,
            "labels": ids,
            "tokens": TOKENS,
            "config": nnscaler.ComputeConfig(len(ranks), len(ranks), trace_strategy="cpu"),
        }
        text = snippet.replace("gpus=4", f"gpus={len(ranks)}")
        text = text.replace(", config)", f", config, gen_savedir={str(folder)!r})")
        heading = "import torch\nfrom nnscaler_ring.policies import shard_sequence\n"
        file = folder / f"{folder.name}_snippet.py"  # nnScaler reads the source of what it traces
        file.write_text(heading + text)
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[file.stem] = module
        vars(module).update(given)
        listener = Listener(logging.WARNING)
        for name in ("nnscaler", "nnscaler_ring"):
            logging.getLogger(name).addHandler(listener)
        try:
            spec.loader.exec_module(module)
        finally:
            for name in ("nnscaler", "nnscaler_ring"):
                logging.getLogger(name).removeHandler(listener)
            del sys.modules[file.stem]
        return warnings, generated_code(folder)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_nothing_is_gathered(two_ranks: RankPool, snippet: str) -> None:
    for warnings, code in two_ranks.run(2, run, snippet, timeout=90):
        told = [x for x in warnings if "unknown" in x or "whole sequence" in x or "gather" in x]
        assert not told
        forward = code.split("def reducer")[0].split("def segment")[1]
        assert "gather" not in forward
        assert re.findall(r"process_group=(None|\(.*?\))", forward) == ["(0, 1)"] * forward.count(
            "process_group="
        )


def test_all_snippets_are_found() -> None:
    """README, docs/nnscaler.md and docs/models.md have one each."""
    assert len(SNIPPETS) >= 3
