"""`sdtpu compile` in one process, a worker in another: it loads what it finds, and neither traces nor compiles."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from sdtpu_worker import generate
from sdtpu_worker.testing.processes import wait_for_line, worker_env
from tests.chaos.fleet import Fleet
from tests.observe.scraping import scrape


@pytest.mark.timeout(300)
def test_a_worker_is_ready_with_programs_made_ahead_in_a_folder_that_it_may_only_read(redis_url, app, tmp_path):
    folder = tmp_path / "programs"
    settings = {"SDTPU_PLATFORM": "cpu", "SDTPU_CPU_DEVICES": "2", "SDTPU_PROGRAMS": str(folder)}
    settings |= {"SDTPU_COMPILE_CACHE": "off", "SDTPU_HEALTH_ADDRESS": "127.0.0.1:0", "SDTPU_PREVIEW_EVERY": "2"}
    with Fleet(redis_url, tmp_path, app="sdtpu_worker.app", **settings) as fleet:
        made = subprocess.run(
            [sys.executable, "-c", "from sdtpu_worker.cli import sdtpu; sdtpu()", "compile", "--json"],
            env=worker_env(redis_url, **settings), capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        programs = json.loads(made.stdout)["programs"]
        assert {each["program"] for each in programs} == {"tick", "snapshot", "restore", "preview"}
        before = {file: file.read_bytes() for file in folder.iterdir()}
        worker = fleet.launch("a")
        line = wait_for_line(worker.process, worker.log, "kept programs in", 120)
        assert "loaded 4 kept programs" in line
        assert "traced the others in 0.00 s, compiled in 0.00 s" in line
        wait_for_line(worker.process, worker.log, " ready.", 60)
        generate.apply_async(("a red circle",), {"seed": 1, "num_inference_steps": 4}).get(timeout=60)
        assert scrape(worker).by_label("sdtpu_programs") == {("kept",): 4, ("cache",): 0, ("compiler",): 0}
        assert {file: file.read_bytes() for file in folder.iterdir()} == before
