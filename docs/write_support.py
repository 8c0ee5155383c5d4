"""Write the table of kernels in docs/support.md from what the kernels say of themselves.

python docs/write_support.py
"""

from dataclasses import replace
from pathlib import Path

import torch

from nnscaler_ring.core.kernels import AUTO_KERNELS, KERNELS, Problem, kernel_refusals

PAGE = Path(__file__).with_name("support.md")
BEGIN, END = "<!-- begin: written by docs/write_support.py -->", "<!-- end -->"

PLAIN = Problem("cpu", torch.float32, 8, 8, 64, 64)
CASES = {
    "causal, full, windows, packed documents": PLAIN,
    "float64": replace(PLAIN, dtype=torch.float64),
    "bfloat16": replace(PLAIN, dtype=torch.bfloat16),
    "float16": replace(PLAIN, dtype=torch.float16),
    "GQA, MQA": replace(PLAIN, num_kv_heads=2),
    "head_dim 256": replace(PLAIN, head_dim=256, v_head_dim=256),
    "v_head_dim other than head_dim": replace(PLAIN, head_dim=192, v_head_dim=128),
    "`softcap`": replace(PLAIN, softcap=True),
    "`alibi_slopes`": replace(PLAIN, alibi=True),
    "`bias`, with gradient": replace(PLAIN, bias=True),
    "`dropout_p`": replace(PLAIN, dropout=True),
    "`deterministic`": replace(PLAIN, deterministic=True),
}


def table() -> str:
    """The kernels' own answers, as Markdown."""
    lines = [
        "| on CPU tensors | " + " | ".join(f"`{name}`" for name in KERNELS) + " |",
        "| --- |" + " --- |" * len(KERNELS),
    ]
    for what, problem in CASES.items():
        answers = kernel_refusals(problem)
        cells = ["yes" if reason is None else f"no: {reason}" for reason in answers.values()]
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    auto = ["yes" if name in AUTO_KERNELS else "no: ask for it by name" for name in KERNELS]
    lines.append('| taken by `kernel="auto"` | ' + " | ".join(auto) + " |")
    return "\n".join(lines)


def page(old: str) -> str:
    """The page with a new table."""
    before, rest = old.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
