"""The document's benchmark: one layer's memory, measured on every rank, by one command."""

import json

from click.testing import CliRunner

from benchmarks.memory_scaling import main, score_matrix_bytes


def test_a_row_per_length_and_ring(tmp_path):
    out = tmp_path / "rows.jsonl"
    sizes = ("--tokens", "301", "--ranks", "1", "--ranks", "2")  # 301 does not divide by two
    done = CliRunner().invoke(main, [*sizes, "--out", str(out)])
    assert done.exit_code == 0 and "1 ranks, MiB" in done.output, done.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["parameters"]["ranks"] for row in rows] == [1, 2]
    for row in rows:
        found = row["results"]
        assert len(found["peak_bytes_by_rank"]) == row["parameters"]["ranks"]
        assert all(peak > 0 for peak in found["peak_bytes_by_rank"]) and found["method"]
        assert found["computed_score_matrix_bytes"] == score_matrix_bytes(301) == 4 * 8 * 301**2
        assert row["commit"] and row["versions"]["torch"]
