"""`sdtpu demo` as a stranger runs it, and what is left when it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from sdtpu_worker.demo.command import PROMPTS
from tests.support.paths import XLA_CACHE
from tests.support.waiting import wait_until
from tools.embedded_checkpoint.scenes import every_scene, judge


def demo(out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from sdtpu_worker.cli import sdtpu; sdtpu()", "demo", "--out", str(out), *options]
    env = {**os.environ, "XDG_CACHE_HOME": f"{XLA_CACHE}-demo"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_the_demo_draws_what_its_prompts_say_and_accounts_for_its_devices(tmp_path):
    process = demo(tmp_path)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    report = json.loads((tmp_path / "results.json").read_text())
    assert [result["prompt"] for result in report["results"]] == list(PROMPTS)
    assert len({result["task_id"] for result in report["results"]}) == 24
    pictures = sorted(tmp_path.glob("[0-9]*.png"))
    assert len(pictures) == 24
    assert Image.open(pictures[0]).info["prompt"] == PROMPTS[0]
    scenes = {scene.caption(): scene for scene in every_scene()}
    right = Counter()
    for path, prompt in zip(pictures, PROMPTS, strict=True):
        seen, scene = judge(Image.open(path)), scenes[prompt]
        right["colours"] += (seen.colour, seen.background) == (scene.colour, scene.background)
        right["shape"] += seen.shape == scene.shape
    assert right["colours"] >= 23, right
    assert right["shape"] >= 22, right
    summary = report["summary"]
    assert summary["jobs"] == 24
    assert summary["slots"] == summary["devices"] == 8
    assert 0.5 < summary["slot_occupancy"] <= 1
    assert summary["device_seconds_used"] > 0
    assert Image.open(tmp_path / "grid.png").width > 6 * 160
    for line in ("device-seconds used", "device-seconds idle", "slot occupancy", "seconds per image"):
        assert line in output
    assert not processes_of(tmp_path)


@pytest.mark.slow
def test_ctrl_c_stops_everything_that_the_demo_started(tmp_path):
    process = demo(tmp_path, "--prompt", "a red circle", "--devices", "2")
    wait_until(lambda: (tmp_path / "worker.log").exists() or process.poll() is not None, "the worker to start", 60)
    assert process.poll() is None, process.communicate()[0]
    wait_until(lambda: len(descendants(process.pid)) >= 2, "Redis and the worker to run")
    children = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Error: stopped" in output
    assert "Traceback" not in output
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


def test_a_bad_prompt_is_named_before_anything_heavy_runs(tmp_path):
    process = demo(tmp_path, "--prompt", " ")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "InvalidRequest: prompt must not be empty" in output
    assert not (tmp_path / "worker.log").exists()


def processes_of(folder: Path) -> list[str]:
    """Return the command lines of processes that work in or write to a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            links = [os.readlink(path / "cwd"), *(os.readlink(fd) for fd in (path / "fd").iterdir())]
            if int(path.name) != os.getpid() and any(str(folder) in link for link in links):
                found.append((path / "cmdline").read_text())
        except OSError:
            continue
    return found


def descendants(pid: int) -> list[int]:
    """Return the children of a process and theirs."""
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return children + [grandchild for child in children for grandchild in descendants(child)]
