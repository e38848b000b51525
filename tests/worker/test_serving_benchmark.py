"""The side-by-side benchmark: one system through a real worker."""

from __future__ import annotations

import json

import pytest

from benchmarks import serving


@pytest.mark.slow
def test_one_system_is_measured_through_a_real_worker_and_the_runs_are_kept(tmp_path, capsys):
    out = tmp_path / "results"
    options = ["--quick", "--systems", "ours", "--mixes", "mixed", "--compile-cache", str(tmp_path), "--out", str(out)]
    serving.main(options)
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert [(run["load"], run["jobs"], run["failed"], run["unfinished"]) for run in runs] == [
        (None, 24, 0, 0),
        (60.0, 24, 0, 0),
    ]
    assert all(len(run["latencies_s"]) == 24 and run["waste"] == 0 and 0 < run["occupancy"] <= 1 for run in runs)
    serving.main([*options, "--plot-only"])
    assert "all at once" in (out / "table.md").read_text()
