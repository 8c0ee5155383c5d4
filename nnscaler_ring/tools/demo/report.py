"""What the demonstration leaves behind: a sentence, demo.json and a figure."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnscaler_ring.core.device import device_name
from nnscaler_ring.tools.demo.run import DemoConfig, DemoResult, differences, tokens_per_second
from nnscaler_ring.tools.demo.train import TrainResult
from nnscaler_ring.tools.machine import package_versions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIB = 2**20
LAST_STEPS = 10  # one step alone depends on its text
ONE_COLOUR, RANKS_COLOUR, GREY = "#0b7285", "#e8590c", "#868e96"


def sentence(config: DemoConfig, result: DemoResult) -> str:
    """What was shown, in one plain sentence with the measured numbers."""
    steps = result.alone.steps
    last = steps[-LAST_STEPS:]
    final = sum(step.loss for step in last) / len(last)
    verdict = "the same training" if result.is_equal else "NOT the same training"
    one, *more = memory_per_rank(result).items()
    memory = "".join(f", {highest / MIB:.0f} MiB on each of {count}" for count, highest in more)
    return (
        f"{len(steps)} steps on real text took the loss from {steps[0].loss:.2f} to {final:.2f} "
        f"(mean of the last {len(last)}), and {config.ranks_name} did {verdict} as one device: "
        f"the losses differ by at most {_share(result.largest_difference)} in float32 and "
        f"{_share(result.largest_difference_float64)} in float64; attention to "
        f"{config.attention.tokens} tokens took at most {one[1] / MIB:.0f} MiB on one rank{memory}."
    )


def _share(difference: float) -> str:
    return f"{difference:.1e} of their value" if difference else "nothing at all"


def memory_per_rank(result: DemoResult) -> dict[int, int]:
    """Number of ranks -> peak bytes of attention on the rank that needed most."""
    return {count: max(peak.bytes for peak in peaks) for count, peaks in result.memory.items()}


def summary(config: DemoConfig, result: DemoResult, command: str) -> dict[str, Any]:
    """Everything, as demo.json holds it. Bytes and seconds unless a name says otherwise."""
    alone, ranks = result.alone, result.ranks
    losses = zip(alone.steps, ranks[0].steps, _differences(alone, ranks), strict=True)
    return {
        "sentence": sentence(config, result),
        "equal": result.is_equal,
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(config.device),
        "versions": package_versions(),
        "seconds": round(result.seconds, 1),
        "config": asdict(config) | {"text": str(config.text) if config.text else None},
        "text": {
            "source": result.corpus.source,
            "bytes": sum(map(len, result.corpus.documents)),
        },
        "weights": alone.weights,
        "kernels": alone.kernels,
        "steps": [
            {
                "step": one.step,
                "loss_one_device": one.loss,
                "loss_ranks": many.loss,
                "relative_difference": difference,
            }
            for one, many, difference in losses
        ],
        "largest_relative_difference": result.largest_difference,
        "largest_relative_difference_float64": result.largest_difference_float64,
        "losses_float64": {
            "one_device": [step.loss for step in alone.steps_float64],
            "ranks": [step.loss for step in ranks[0].steps_float64],
        },
        "largest_difference_of_weights_between_ranks": max(r.weights_spread for r in ranks),
        "tokens_per_second": {
            "one_device": tokens_per_second(alone, config.train.tokens),
            "ranks": tokens_per_second(ranks[0], config.train.tokens),
        },
        "attention_bytes_sent_per_step": [asdict(r.steps[-1].sent) for r in ranks],
        "weight_gradient_bytes_per_step": 4 * alone.weights,
        "peak_memory_of_a_training_step": {
            "method": alone.memory_method,
            "one_device": alone.peak_bytes,
            "ranks": [r.peak_bytes for r in ranks],
        },
        "attention_memory": {
            "method": result.memory[1][0].method,
            "bytes_per_rank": {
                str(count): [peak.bytes for peak in peaks] for count, peaks in result.memory.items()
            },
        },
    }


def _differences(alone: TrainResult, ranks: list[TrainResult]) -> list[float]:
    return differences(alone.steps, ranks[0].steps)


def write_report(config: DemoConfig, result: DemoResult, out: Path, command: str) -> list[Path]:
    """Write demo.json and the figure into the folder `out`; returns their paths."""
    data, figure = out / "demo.json", out / "losses_and_memory.png"
    data.write_text(json.dumps(summary(config, result, command), indent=2) + "\n")
    draw(config, result, figure)
    return [figure, data]


def draw(config: DemoConfig, result: DemoResult, path: Path) -> None:
    """Left the losses and their difference, right the memory of attention against N."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.4), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(2, 1), width_ratios=(1.25, 1))
    losses = figure.add_subplot(grid[0, 0])
    _draw_losses(losses, config, result)
    _draw_differences(figure.add_subplot(grid[1, 0], sharex=losses), result)
    _draw_memory(figure.add_subplot(grid[:, 1]), config, result)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _draw_losses(axes: Axes, config: DemoConfig, result: DemoResult) -> None:
    axes.plot(
        [step.loss for step in result.alone.steps],
        color=ONE_COLOUR,
        linewidth=6,
        alpha=0.35,
        solid_capstyle="round",
        label="one device",
    )
    axes.plot(
        [step.loss for step in result.ranks[0].steps],
        color=RANKS_COLOUR,
        linewidth=1.6,
        label=f"{config.ranks_name}, {config.train.op}",
    )
    axes.set_ylabel("loss (nats per byte)")
    axes.set_title("The same training on one device and on ranks", loc="left")
    axes.tick_params(labelbottom=False)
    axes.legend(frameon=False)


def _draw_differences(axes: Axes, result: DemoResult) -> None:
    values = dict(enumerate(_differences(result.alone, result.ranks)))
    differing = {step: value for step, value in values.items() if value > 0}
    eps = torch.finfo(torch.float32).eps
    floor = min([*differing.values(), eps]) / 5
    axes.scatter(list(differing), list(differing.values()), s=14, color=RANKS_COLOUR)
    axes.axhline(eps, color=GREY, linewidth=1, linestyle="--", label="one rounding in float32")
    equal = [step for step in values if step not in differing]
    if equal:
        axes.scatter(
            equal,
            [floor] * len(equal),
            s=14,
            marker="v",
            color=GREY,
            clip_on=False,
            label="equal to the last bit",
        )
    axes.set_yscale("log")
    axes.set_ylim(floor, max([*values.values(), eps]) * 20)
    axes.set_xlabel("step")
    axes.set_ylabel("relative difference")
    axes.legend(frameon=False, ncols=2, loc="upper left", fontsize=8)


def _draw_memory(axes: Axes, config: DemoConfig, result: DemoResult) -> None:
    memory = {count: highest / MIB for count, highest in memory_per_rank(result).items()}
    counts = [1 + n / 50 for n in range(50 * (max(memory) - 1) + 1)]
    axes.plot(
        counts,
        [memory[1] / count for count in counts],
        color=GREY,
        linestyle="--",
        linewidth=1.2,
        label="ideal: 1/N of one device",
    )
    axes.plot(
        list(memory),
        list(memory.values()),
        color=ONE_COLOUR,
        marker="o",
        linewidth=0,
        markersize=8,
        label="measured, the rank that needs most",
    )
    for count, mib in memory.items():
        axes.annotate(
            f"{mib:.0f} MiB", (count, mib), xytext=(8, 6), textcoords="offset points", fontsize=10
        )
    axes.set_xticks(list(memory))
    axes.set_ylim(0, max(1, *memory.values()) * 1.15)
    axes.set_xlim(0.8, max(memory) + 0.6)
    axes.set_xlabel("ranks N")
    axes.set_ylabel("peak memory per rank (MiB)")
    axes.set_title(
        f"Attention to {config.attention.tokens} tokens, forward and backward", loc="left"
    )
    axes.legend(frameon=False)
