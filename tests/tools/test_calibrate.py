"""Calibration: the fit, the cases, and a cluster's file that plans accept."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nnscaler_ring.core.plan.schedule import CAUSAL
from nnscaler_ring.simulator.cluster import check_cluster, load_cluster
from nnscaler_ring.tools.calibrate import CASES, RANKS, Case, _line, _tiles, calibrate, compare


def test_a_line_is_found() -> None:
    x = [1e3, 1e5, 1e7]
    constant, slope = _line(x, [2e-4 + 3e-9 * n for n in x])
    assert constant == pytest.approx(2e-4)
    assert slope == pytest.approx(3e-9)


def test_cases_cover_layouts_masks_lengths_and_exchanges() -> None:
    assert len(CASES) >= 10
    assert {case.layout for case in CASES} == {"zigzag", "contiguous"}
    assert {case.exchange for case in CASES} == {"direct", "ring", "all_gather"}
    assert len({case.mask for case in CASES}) >= 3
    assert len({case.tokens for case in CASES}) >= 3
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(tile.pairs() > 0 for tile in _tiles())


@pytest.mark.full
def test_calibrates_predicts_and_writes_a_file_that_is_read(tmp_path: Path) -> None:
    cluster = calibrate()
    check_cluster(cluster)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(cluster.to_json()))
    assert replace(load_cluster(str(path))) == cluster
    (row,) = compare(cluster, [Case(2048, "zigzag", CAUSAL)])
    assert len(row["sent_bytes"]) == RANKS
    assert row["sent_bytes"] == row["predicted_sent_bytes"]
    assert abs(row["memory_error"]) < 0.05
    assert row["measured_seconds"]["step"] > 0
    assert row["predicted_seconds"]["step"] > 0
