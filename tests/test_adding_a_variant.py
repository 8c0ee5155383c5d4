"""docs/adding_a_variant.md: its examples, put into a copy of the package as the page says, work.

The page names a new file with its text, and a list with its new lines, four times. A process whose
`nnscaler_ring` is that copy takes each variant through the engine on three ranks, the public
functions, the simulator, dilated attention, the painted picture and the tables of other tests.
"""

import inspect
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import nnscaler_ring
from nnscaler_ring import wrap_ring_attn_func
from nnscaler_ring.core.dilated import DilatedPlan, dilated_backward, dilated_forward
from nnscaler_ring.core.kernels import Problem, select_kernel
from nnscaler_ring.core.op.attention import context_parallel_attention
from nnscaler_ring.core.plan.dilation import Branch, HeadOffsets
from nnscaler_ring.core.plan.layout import LAYOUTS
from nnscaler_ring.core.sizes import Sizes
from nnscaler_ring.masks import CAUSAL, mask_of
from nnscaler_ring.simulator import (
    GeneratedInputs,
    RingAttentionMemoryProfiler,
    RingAttentionSimulator,
    SimulatedCall,
    WholeInputs,
)
from nnscaler_ring.simulator.cluster import load_cluster
from nnscaler_ring.simulator.memory import traits_of
from nnscaler_ring.simulator.timeline import simulate_timeline
from nnscaler_ring.tools.commands import commands
from tests.core import test_message_lifetimes, test_programs
from tests.core.kernels import test_reference, test_selection
from tests.core.plan import test_layout, test_masks, test_schedule
from tests.core.plan.test_schedule import dense_problem
from tests.core.test_message_lifetimes import Late, run_ranks
from tests.dilated_oracle import dilated_gradients
from tests.oracle import dense_attention, dense_gradients, make_dout, make_qkv
from tests.tolerances import assert_close_float64

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "adding_a_variant.md"
FILE = re.compile(r"is\s`(core/[\w/]+\.py)`:\n\n```python\n(.*?)```", re.DOTALL)
LIST = re.compile(r"new in `(core/[\w/]+\.py)`:\n\n```diff\n(.*?)```", re.DOTALL)
VARIANTS = {
    "layout": {"q_layout": "block_cyclic"},
    "mask": {"mask": "EveryOther(size=6)"},
    "exchange": {"exchange": "at_once"},
    "kernel": {"kernel": "dense"},
}
"""What of a `SimulatedCall` chooses the variant; all else is as in `USUAL`."""
PROBLEM = Problem("cpu", torch.float64, 4, 2, 5, 3)
USUAL = {"q_layout": "zigzag", "mask": "CAUSAL", "exchange": "direct", "kernel": "reference"}


def put_in(package: Path, page: str) -> None:
    """What the page says, done to a copy of the package."""
    files, lists = FILE.findall(page), LIST.findall(page)
    for path, text in files:
        assert not (package / path).exists(), f"{path} is not new"
        (package / path).write_text(text)
    for path, changes in lists:
        text = (package / path).read_text()
        for change in changes.split("@@\n"):
            lines = change.splitlines()
            old = "\n".join(line[1:] for line in lines if not line.startswith("+"))
            new = "\n".join(line[1:] for line in lines)
            assert text.count(old) == 1, f"{path} has {text.count(old)} times:\n{old}"
            text = text.replace(old, new)
        (package / path).write_text(text)
    assert len(files) == len({path for path, _ in lists}) == len(lists) == len(VARIANTS)


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By the name of a check what went wrong in it, "" for nothing."""
    folder = tmp_path_factory.mktemp("variants")
    shutil.copytree(Path(nnscaler_ring.__file__).parent, folder / "nnscaler_ring")
    put_in(folder / "nnscaler_ring", PAGE.read_text())
    for name in ("tests", "docs"):
        (folder / name).symlink_to(ROOT / name)
    command = "from tests.test_adding_a_variant import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert Path(found.pop("package")).parents[1] == folder, found
    return found


def names_of_checks() -> list[str]:
    """Every check here, of every variant that it is about."""
    everything = itertools.product(("engine", "results", "memory", "timeline"), VARIANTS)
    some = [("dilated", "exchange"), ("dilated", "kernel")]
    some += [("picture", "layout"), ("picture", "mask")]
    some += [("tables", variant) for variant in VARIANTS]
    some += [("public", variant) for variant in VARIANTS] + [("command_line", "exchange")]
    return [f"{check} {variant}" for check, variant in (*everything, *some)]


@pytest.mark.parametrize("name", names_of_checks())
def test_the_variant_goes_everywhere(failures: dict[str, str], name: str) -> None:
    assert not failures[name], failures[name]


def main() -> None:
    """In the process whose package is the copy: all checks; what went wrong, as JSON."""
    torch.set_num_threads(1)
    found = {"package": nnscaler_ring.__file__}
    for name in names_of_checks():
        check, variant = name.split()
        try:
            globals()[f"check_{check}"](variant)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    sys.stdout.write(json.dumps(found))


# From here on: run by `main` alone.


def call_of(variant: str, tokens: int, sizes: Sizes) -> SimulatedCall:

    options = {**USUAL, **VARIANTS[variant]}
    options["mask"] = mask_of(options["mask"])
    return SimulatedCall(tokens, 3, sizes, **options)


def check_engine(variant: str) -> None:
    """Three ranks that are threads, and messages that come as late as they may."""

    options = {**USUAL, **VARIANTS[variant]}
    name = options["q_layout"]
    kernel = select_kernel(options["kernel"], PROBLEM)
    assert kernel.name == options["kernel"]
    test_message_lifetimes.Reference = lambda: kernel
    for seed, lens in enumerate(([17, 0, 31], [1, 0, 0], [130, 131, 129])):
        problem = dense_problem(name, name, lens, False, (-1, -1), options["mask"])
        test_message_lifetimes.check(problem, seed, options["exchange"], keys=3)


def check_results(variant: str) -> None:
    """The simulator's ranks."""

    q, k, v = make_qkv(3, 1, 391, 391, 6, 2, 8, 6)
    dout = make_dout(3, q, v)
    call = call_of(variant, 391, Sizes(6, 2, 8, 6, "float64"))
    simulator = RingAttentionSimulator(call, WholeInputs(q, k, v, dout))
    found = simulator.all_ranks(backward=True)
    expected = dense_gradients(q, k, v, dout, softmax_scale=call.scale, mask=call.mask)
    for ours, dense in zip(found[:5], expected, strict=True):
        assert_close_float64(ours, dense, variant)
    for rank, sent in enumerate(found.sent):
        predicted = call.sizes.sent_bytes(call.program(rank).sent())
        assert sent.forward_kv_bytes == predicted.forward_kv_bytes
        assert sent.gradient_bytes == predicted.gradient_bytes
    assert sum(sent.total_bytes for sent in found.sent) > 0


def check_memory(variant: str) -> None:
    """Measured as predicted, but for the whole score matrices of "dense", which nobody predicts."""
    sizes = Sizes(2, 1, 16, 16, "float32" if variant == "kernel" else "bfloat16")
    call = call_of(variant, 3 * 512, sizes)
    if variant != "kernel":
        call = replace(call, kernel="torch_cpu")
    simulator = RingAttentionSimulator(call, GeneratedInputs(sizes))
    found = RingAttentionMemoryProfiler(simulator, 2).profile()
    assert found.predicted is not None
    if variant == "kernel":
        tiles = call.schedule.tiles(2, (2,))
        largest = max((tile.q1 - tile.q0) * (tile.k1 - tile.k0) for tile in tiles)
        assert found.highest["temp_scores"] > largest * sizes.num_heads * 4
    else:
        assert abs(found.predicted - found.total) <= 0.05 * found.total, found


def check_timeline(variant: str) -> None:
    call = call_of(variant, 12_288, Sizes(32, 8, 128, 128, "bfloat16"))
    traits = traits_of(select_kernel(call.kernel, PROBLEM))
    ranks = simulate_timeline(call, load_cluster("h200"), traits, backward=True).ranks
    assert all(rank.seconds("compute") > 0 and rank.seconds("transfer") > 0 for rank in ranks)


def check_dilated(variant: str) -> None:
    """Branches that reach beyond shards, so that rows travel."""

    options = {**USUAL, **VARIANTS[variant]}
    kernel = select_kernel(options["kernel"], PROBLEM)
    lens = (12, 1, 10)
    branches = [Branch(7, 1), Branch(sum(lens), 2), Branch(13, 3)]
    q, k, v = make_qkv(5, 1, sum(lens), sum(lens), 4, 2, 5, 3)
    tensors = q, k, v, make_dout(5, q, v)

    def rank_main(transport: Late) -> list[torch.Tensor]:
        block = transport.place.block
        q, k, v, dout = (x.split(lens, dim=1)[block] for x in tensors)
        offsets = HeadOffsets("mod", 0, 4)
        plan = DilatedPlan.of(branches, offsets, 2, lens, CAUSAL, options["exchange"], block)
        way = {"plan": plan, "transport": transport, "kernel": kernel, "softmax_scale": 0.4}
        out, lse = dilated_forward(q, k, v, **way)
        return [out, lse, *dilated_backward(dout, None, q, k, v, out, lse, **way)]

    pattern = [b.length for b in branches], [b.rate for b in branches]
    dense = dilated_gradients(*tensors, None, *pattern, causal=True, softmax_scale=0.4)
    shards = run_ranks(len(lens), rank_main)
    for n, expected in enumerate(dense):
        ours = torch.cat([shard[n] for shard in shards], dim=2 if n == 1 else 1)
        assert_close_float64(ours, expected, f"{n} of {variant}")


def check_picture(variant: str) -> None:
    """White where nothing is seen, and the colours of the ranks that hold the queries elsewhere."""
    from docs import draw_tiles

    tokens, ranks, mask = draw_tiles.TOKENS, draw_tiles.RANKS, CAUSAL
    layout = draw_tiles.CONTIGUOUS
    if variant == "layout":
        layout = LAYOUTS["block_cyclic"](tokens, ranks, block=5)
    else:
        ((title, layout, mask),) = [x for x in draw_tiles.MASKS if "EveryOther" in x[0]]
        assert title == VARIANTS["mask"]["mask"]
    image, pairs = draw_tiles.paint(layout, mask)
    for rank in range(ranks):
        shades = {draw_tiles.shade(draw_tiles.COLOURS[rank], step) for step in range(ranks)}
        rows = list(itertools.chain(*layout.positions(rank)))
        assert len(rows) > 0
        seen = [(i, j) for i in rows for j in range(tokens) if mask.sees(i, j)]
        assert pairs[rank] == len(seen) == sum(image[i][j] != (1.0,) * 3 for i, j in seen)
        assert all(image[i][j] in shades for i, j in seen)
        assert sum(image[i][j] == (1.0,) * 3 for i in rows for j in range(tokens)) == (
            len(rows) * tokens - len(seen)
        )


def check_public(variant: str) -> None:
    """By its name, through a registered op, on one device."""

    q, k, v = make_qkv(1, 2, 29, 29, 6, 2, 4)
    name = VARIANTS[variant].get("q_layout")
    if name is None:
        out = wrap_ring_attn_func(q, k, v, **VARIANTS[variant])
    else:
        defaults = inspect.signature(wrap_ring_attn_func).parameters.items()
        options = {x: p.default for x, p in defaults if p.default is not p.empty}
        options |= {"layout": name, "layouts": {name: (name, name)}}
        out = context_parallel_attention("block_cyclic_attn", q, k, v, **options)
    mask = VARIANTS[variant].get("mask", "CAUSAL")
    dense, _ = dense_attention(q, k, v, softmax_scale=0.5, mask=mask)
    assert_close_float64(out, dense, variant)


def check_command_line(variant: str) -> None:

    ((line,),) = (re.findall(r"`nnscaler-ring (plan .*?)`", PAGE.read_text()),)
    done = CliRunner().invoke(commands, line.split())
    assert done.exit_code == 0, done.output
    assert "send keys" in done.output and VARIANTS[variant]["exchange"] in line


def check_tables(variant: str) -> None:
    """Tests that go over the lists by themselves have the new entry, and hold."""
    match variant:
        case "layout":
            test_layout.test_spans_are_the_definition("block_cyclic")
            test_schedule.test_examples_of_every_kind_of_mask_are_painted("block_cyclic")
        case "mask":
            test_masks.test_every_kind_gives_examples_of_itself("EveryOther")
            test_masks.test_a_mask_means_what_it_says()
            test_masks.test_text_makes_the_same_mask()
            test_masks.test_bands_of_two_spans_hold_each_visible_pair_once()
        case "exchange":
            assert "at_once" in test_programs.ALL
            test_programs.test_ranks_get_through_and_compute_every_pair_once("at_once", True)
        case "kernel":
            test_selection.test_a_kernel_is_found_by_its_name("dense")
            kernel = select_kernel("dense", PROBLEM)
            for shape in test_reference.random_shapes(1, 20, size=10):
                tensors = test_reference.inputs(shape, (6, 2), (4, 2))
                test_reference.check_tile(kernel, shape, *tensors)
                test_reference.check_shares(kernel, shape, shape.nk // 2)
            test_reference.check_large_logits(kernel, torch.float64)
