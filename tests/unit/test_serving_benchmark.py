"""The side-by-side benchmark: its schedules and its report."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from benchmarks.serving_constant_speed import ConstantSpeed
from benchmarks.serving_load import MIXES, draw_arrivals
from benchmarks.serving_report import write_report
from benchmarks.serving_run import Run
from sdtpu_worker.aggregator.costs import Cost
from sdtpu_worker.aggregator.plan import Phase, Plan
from sdtpu_worker.testing.fake_engine import FakeEngine, FakeJob

ABOUT = {"date": "2000-01-01", "machine": "a machine", "versions": {"jax": "1.0"}}
CONFIG = {"jobs": 40, "seed": "test", "step_ms": 30.0}


def make_run(system: str, load: float | None, mean_s: float, mix: str = "mixed", **changes) -> Run:
    values = {
        "system": system, "mix": mix, "load": load, "repeat": 0, "rate": load and load / 10, "jobs": 40, "failed": 0,
        "unfinished": 0, "backlog": 3, "kept_up": True, "throughput": (load or 100) / 10, "sustained": 10.0,
        "mean_s": mean_s, "p50_s": mean_s, "p95_s": 2 * mean_s, "p99_s": 3 * mean_s, "occupancy": 0.5, "waste": 0.0,
        "max_late_s": 0.0, "latencies_s": [mean_s] * 40,
    }  # fmt: skip
    return Run(**{**values, **changes})


def test_schedules_are_drawn_from_the_seed_and_offer_exactly_their_rate():
    for mix, steps in MIXES.items():
        arrivals = draw_arrivals("seed", mix, 80, 5.0)
        assert arrivals == draw_arrivals("seed", mix, 80, 5.0)
        assert arrivals != draw_arrivals("another", mix, 80, 5.0)
        assert arrivals[-1].at_s == pytest.approx(80 / 5.0)
        assert Counter(a.num_inference_steps for a in arrivals) == dict.fromkeys(steps, 80 // len(steps))
        assert [a.at_s for a in arrivals] == sorted(a.at_s for a in arrivals)
    assert {a.at_s for a in draw_arrivals("seed", "equal", 8, None)} == {0.0}


def test_the_report_says_what_is_met_what_is_missed_and_who_fell_behind(tmp_path):
    runs = [
        make_run("ours", None, 1.0),
        *(make_run("ours", load, 1.0) for load in (60.0, 80.0)),
        *(make_run("fixed-bucketed", load, 4.0) for load in (60.0, 80.0)),
        make_run("fixed-mixed", 60.0, 3.0),
        make_run("fixed-mixed", 80.0, 2.0),
        make_run("celery-batches", 60.0, 0.5),
        make_run("plain", 60.0, 9.0, kept_up=False),
    ]
    write_report(runs, ABOUT, CONFIG, {"mixed": 10.0}, tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert [line.split("|")[3:6:2] for line in table.splitlines() if "mean, of the best fixed" in line] == [
        [" 0.33 ", " yes "],
        [" 0.50 ", " **no** "],
    ]
    assert "60 %: celery-batches has mean 0.50 s against 1.00 s, p99 1.50 s against 3.00 s." in table
    assert "fell behind in 1 of 1 runs" in table
    assert "Measured and simulated" in table
    assert (tmp_path / "serving.png").read_bytes().startswith(b"\x89PNG")


def test_devices_of_constant_speed_compute_everything_and_take_their_time():
    lane = (64, 64)
    engine = FakeEngine()
    execute = ConstantSpeed(engine.execute, Cost(0.01))
    started = time.monotonic()
    first = execute(Plan(lane, ((Phase(insert=(0, "a"), steps=5),), ())), {"a": FakeJob("a", 5)})
    second = execute(Plan(lane, ((Phase(decode=(0, "a")),), ())), {})
    assert first.wait() == []
    (image,) = second.wait()
    assert image.pixels == 5
    assert second.done_at >= first.done_at >= started + 0.05
