"""The child process of `sdtpu plan` is watched: it ends when enough is known, in time, and within its memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.planning import compile_ahead as compiling
from sdtpu_worker.planning.compile_ahead import Limits, PlanFailed, Wanted
from tests.support.paths import ROOT

LONG_S = 45  # less than the fake compiler sleeps


@pytest.fixture(autouse=True)
def fake_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(compiling, "_CHILD", "tests.support.fake_compiler")
    monkeypatch.setattr(compiling.tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(ROOT)


def run(mode: str, **limits: Any) -> tuple[dict[str, Any], list[str]]:
    said: list[str] = []
    found = compiling.compile_ahead(Wanted(mode, "v5e:2x4", 2), Limits(**limits), said.append)
    return found, said


def test_the_child_is_ended_when_the_optimised_program_is_written(tmp_path: Path):
    started = time.monotonic()
    found, said = run("generates code")
    assert time.monotonic() - started < LONG_S
    tick = found["programs"]["tick"]
    assert (tick["total_bytes"], tick["code_bytes"], tick["aliased"]) == (100_000, None, 2)
    assert (found["fits"], found["code_generated"], found["time_limit_passed"]) == (True, False, False)
    assert said[0] == "generates code, 2 slots per device: tracing the programs from shapes"
    assert list(tmp_path.iterdir()) == []


def test_a_full_answer_waits_for_the_code():
    found, _ = run("whole", full=True)
    tick = found["programs"]["tick"]
    assert (tick["argument_bytes"], tick["total_bytes"], tick["code_bytes"]) == (70_000, 80_000, 300)
    assert tick["parts"]["step"]["cycles"] == 100
    assert found["code_generated"]


def test_a_full_answer_that_takes_too_long_has_what_is_known():
    found, _ = run("generates code", full=True, time_s=15.0)
    assert found["programs"]["tick"]["total_bytes"] == 100_000
    assert (found["code_generated"], found["time_limit_passed"]) == (False, True)


def test_a_time_limit_before_any_result_is_an_error(tmp_path: Path):
    with pytest.raises(PlanFailed, match="give a larger --time-limit"):
        run("slow", time_s=4.0)
    assert list(tmp_path.iterdir()) == []


def test_memory_is_bounded(tmp_path: Path):
    started = time.monotonic()
    with pytest.raises(PlanFailed, match="more than --memory-limit allows"):
        run("hungry", memory_bytes=150_000_000)
    assert time.monotonic() - started < LONG_S
    assert list(tmp_path.iterdir()) == []


def test_no_room_is_a_result():
    found, _ = run("no room")
    assert (found["fits"], found["reason"], found["programs"]) == (False, "RESOURCE_EXHAUSTED: 18G of 15.75G", {})


def test_what_is_wrong_is_said_in_the_childs_words():
    with pytest.raises(ConfigurationError, match=r"^--model must be another$"):
        run("wrong")
    with pytest.raises(PlanFailed, match="exit code 1: RuntimeError: it went wrong"):
        run("crash")
