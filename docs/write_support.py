"""Write the tables of kernels in docs/support.md from what the kernels say of themselves.

python docs/write_support.py
"""

from dataclasses import replace
from pathlib import Path

import torch

from nnscaler_ring.core.kernels import Problem, auto_kernels, offer_of

PAGE = Path(__file__).with_name("support.md")
BEGIN, END = "<!-- begin: written by docs/write_support.py -->", "<!-- end -->"

CPU_KERNELS = ("cpu_tiles", "torch_cpu", "reference")
CUDA_KERNELS = (
    *("torch_cuda", "flash_attn", "flash_attn_3", "flash_attn_4", "torch_fa3", "torch_fa4"),
    "reference",
)
CAPABILITIES = {
    "torch_cuda": (8, 0),
    "flash_attn": (8, 0),
    "flash_attn_3": (9, 0),
    "torch_fa3": (9, 0),
    "flash_attn_4": (10, 0),
    "torch_fa4": (10, 0),
    "reference": (8, 0),
}
"""A device that each kernel is made for."""

PLAIN = Problem("cpu", torch.float32, 8, 8, 64, 64)
CASES = {
    "causal, full, windows, packed documents": PLAIN,
    "float64": replace(PLAIN, dtype=torch.float64),
    "float32": PLAIN,
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


DTYPES_ASKED = ("float64", "float32", "bfloat16", "float16")


def answer(name: str, problem: Problem) -> str | None:
    """What a kernel says where everything that it needs is installed."""
    offer = offer_of(name)
    return getattr(offer, "limits", offer.supports)(problem)


def table(device_type: str, kernels: tuple[str, ...]) -> str:
    """The kernels' own answers, as Markdown, with the refusals numbered below."""
    lines = [
        f"| on {device_type.upper()} tensors | "
        + " | ".join(f"`{name}`" for name in kernels)
        + " |",
        "| --- |" + " --- |" * len(kernels),
    ]
    notes: list[str] = []
    for what, case in CASES.items():
        cells = []
        for name in kernels:
            problem = replace(case, device_type=device_type)
            if device_type == "cuda":
                capability = CAPABILITIES[name]
                # What is asked about is the option: half precision, unless that is the question.
                dtype = torch.bfloat16 if what not in DTYPES_ASKED else case.dtype
                problem = replace(problem, compute_capability=capability, dtype=dtype)
            reason = answer(name, problem)
            if reason is None:
                cells.append("yes")
                continue
            if reason not in notes:
                notes.append(reason)
            cells.append(f"no ({notes.index(reason) + 1})")
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    auto = [taken_by_auto(name) for name in kernels]
    lines.append('| taken by `kernel="auto"` | ' + " | ".join(auto) + " |")
    numbered = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return "\n".join([*lines, "", *numbered] if notes else lines)


def taken_by_auto(name: str) -> str:
    """When `kernel="auto"` asks a kernel."""
    if name in auto_kernels(PLAIN):
        return "yes"
    return "for `softcap`" if name in auto_kernels(CASES["`softcap`"]) else "by name only"


def page(old: str) -> str:
    """The page with new tables."""
    before, rest = old.split(BEGIN)
    _, after = rest.split(END)
    tables = f"{table('cpu', CPU_KERNELS)}\n\n{table('cuda', CUDA_KERNELS)}"
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
