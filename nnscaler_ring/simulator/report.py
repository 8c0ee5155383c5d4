"""A simulation's record as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnscaler_ring.simulator.planner import gigabytes


def markdown(record: Mapping[str, Any], pictures: Sequence[Path], command: str) -> str:
    """What was simulated, what came out, and what it does not show."""
    call, sizes = record["call"], record["call"]["sizes"]
    mask = ", ".join(f"{side} {n}" for side, n in call["mask"].items() if n is not None) or "full"
    verdict = "exact" if record["is_exact"] else "WRONG"
    lines = [
        f"# {call['tokens']:,} tokens over {call['ranks']} simulated ranks",
        "",
        f"`{command}`",
        "",
        f"Simulated: {record['simulated']}, in one process on {record['device']}, in "
        f"{record['seconds_here']:.1f} s. Layout {call['q_layout']}, exchange {call['exchange']}, "
        f"mask {mask}; {sizes['num_heads']} heads on {sizes['num_kv_heads']} KV heads, head_dim "
        f"{sizes['head_dim']}, batch {sizes['batch']}, {sizes['dtype']}, kernel "
        f"{record['kernel']}.",
        "",
        f"**Results are {verdict}**: {record['sampled_rows']} sampled rows differ from float64 by "
        f"at most {record['largest_error']:.1e} (limit {record['error_limit']:.0e}).",
        "",
        "## Bytes",
        "",
        "| rank | sent | predicted | messages |",
        "| --- | ---: | ---: | ---: |",
    ]
    rows = zip(
        record["sent_bytes"], record["predicted_sent_bytes"], record["messages"], strict=True
    )
    for number, (sent, predicted, messages) in enumerate(rows):
        lines.append(f"| {number} | {sent} | {predicted} | {messages} |")
    lines += [
        "",
        "## Memory of the last rank",
        "",
        "The peak of live tensor bytes, counted, and what the tiles foretell.",
        "",
        "| ring size | measured | predicted | difference | largest components at the peak |",
        "| ---: | ---: | ---: | ---: | --- |",
    ]
    for entry in record["memory"]:
        largest = sorted(entry["at_peak"].items(), key=lambda item: -item[1])[:3]
        parts = ", ".join(f"{name} {gigabytes(n)}" for name, n in largest)
        difference = entry["predicted"] / entry["measured"] - 1
        lines.append(
            f"| {entry['ring_size']} | {gigabytes(entry['measured'])} | "
            f"{gigabytes(entry['predicted'])} | {difference:+.1%} | {parts} |"
        )
    lines += [
        "",
        f"## Time on {record['cluster']['name']}: predicted, not measured",
        "",
        record["cluster"]["source"],
        "",
        "| pass | seconds | transfers hidden | longest compute | longest wait | for a late peer |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, timeline in record["timeline"].items():
        compute = max(rank["compute_seconds"] for rank in timeline["ranks"])
        wait, late = (
            max(rank[f"{kind}_seconds"] for rank in timeline["ranks"]) for kind in ("wait", "late")
        )
        lines.append(
            f"| {name} | {timeline['seconds']:.3g} | {timeline['overlap']:.0%} | {compute:.3g} | "
            f"{wait:.3g} | {late:.3g} |"
        )
    lines += ["", *(f"![{path.stem}]({path.name})" for path in pictures), ""]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines += [f"{versions}; {record['date']}.", ""]
    return "\n".join(lines)
