"""`sdtpu demo` as a stranger runs it, and what is left when it is interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from PIL import Image

from sdtpu_worker.cli import sdtpu
from sdtpu_worker.demo import mix
from sdtpu_worker.demo.command import PROMPTS
from tests.support.paths import XLA_CACHE
from tests.support.waiting import wait_until
from tools.embedded_checkpoint.scenes import every_scene, judge
from tools.embedded_checkpoint.score_outline import judge_outline

WAIT = {"Prefer": "wait=50"}


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
    assert re.search(r"worker start-up +\d+\.\d s \(process", output), output
    for line in ("device-seconds used", "device-seconds idle", "slot occupancy", "seconds per image"):
        assert line in output
    assert not processes_of(tmp_path)


@pytest.mark.slow
def test_ctrl_c_stops_everything_that_the_demo_started(tmp_path):
    process = demo(tmp_path, "--prompt", "a red circle", "--devices", "2")
    wait_until(lambda: (tmp_path / "worker.log").exists() or process.poll() is not None, "the worker to start")
    assert process.poll() is None, process.communicate()[0]
    wait_until(lambda: len(descendants(process.pid)) >= 2, "Redis and the worker to run")
    children = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Error: stopped" in output
    assert "Traceback" not in output
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_the_page_of_the_demo_makes_pictures_until_it_is_stopped(tmp_path, number):
    process = demo(tmp_path, "--web", "--no-browser", "--devices", "2")
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "Ctrl-C ends everything" in line:
            break
    (url,) = re.findall(r"the page: (http://127\.0\.0\.1:\d+)/", "".join(lines))
    with httpx.Client(base_url=url, follow_redirects=True, timeout=60, trust_env=False) as client:
        page = client.get("/")
        assert (page.status_code, page.url.path) == (200, "/v1/jobs/page/")
        job = client.post("/v1/jobs", json={"prompt": "a red circle", "num_inference_steps": 4}, headers=WAIT).json()
        assert job["status"] == "succeeded"
        wait_until(lambda: client.get("/v1/jobs/capabilities").json()["workers"], "the worker's report")
        served = client.get("/v1/jobs/capabilities").json()
        assert (served["model"], served["previews"], served["loras"]["names"]) == ("embedded", True, ["outline"])
    children = descendants(process.pid)
    assert len(children) >= 3, "a Redis, a worker and a door"
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert (process.returncode, "stopped" in output, "Traceback" in output) == (0, True, False)
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--web", "--mix"], "--mix, --prompt and --steps must be left out with --web"),
        (["--web", "--prompt", "a fox"], "--mix, --prompt and --steps must be left out with --web"),
        (["--no-browser"], "--no-browser must come with --web"),
    ],
)
def test_what_the_page_of_the_demo_asks_for_itself_is_refused_with_a_line(tmp_path, options, text):
    result = CliRunner().invoke(sdtpu, ["demo", "--out", str(tmp_path / "out"), *options])
    assert (result.exit_code, text in result.output) == (1, True)
    assert not (tmp_path / "out").exists()


def test_a_bad_prompt_is_named_before_anything_heavy_runs(tmp_path):
    process = demo(tmp_path, "--prompt", " ")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "InvalidRequest: prompt must not be empty" in output
    assert not (tmp_path / "worker.log").exists()


@pytest.mark.slow
def test_the_mix_draws_jobs_of_all_kinds_in_one_batch_and_compiles_nothing_meanwhile(tmp_path):
    process = demo(tmp_path, "--mix")
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    report = json.loads((tmp_path / "results.json").read_text())
    results, summary = report["results"], report["summary"]
    assert [result["prompt"] for result in results] == [job.prompt for job in mix.JOBS]
    assert [result["sampler"] for result in results] == [job.sampler for job in mix.JOBS]
    brought = Counter(name for result in results for name in result["options"])
    assert [brought[name] for name in ("image", "mask_image", "loras")] == [7, 3, 8]
    assert summary["programs_compiled_meanwhile"] == 0
    shared = re.search(r"one device batch +(\d+) jobs in one tick of \d+, of (\d+) kinds, with (\d+)", output)
    jobs, kinds, settings = map(int, shared.groups())
    assert jobs >= 12 <= summary["slots"] == 24
    assert kinds >= 6
    assert settings >= 6
    assert "compiled meanwhile   nothing" in output
    for job in mix.JOBS:
        assert re.search(rf"{re.escape(job.kind)} +{re.escape(job.sampler)} .*{re.escape(job.prompt)}", output)
    drawn = [Image.open(next(tmp_path.glob(f"{number:03}-*.png"))) for number in range(24)]
    assert [judge(drawn[number]).colour for number in (0, 1)] == ["red", "blue"]
    filled, outlined = (judge_outline(drawn[number]) for number in (8, 10))
    assert (filled.is_outlined, outlined.is_outlined) == (False, True), "the same request with weights of 0 and 1"
    assert outlined.border == filled.border == "blue"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--model", "embedded-turbo"], r"--model must be embedded with --mix, .*got 'embedded-turbo'"),
        (["--prompt", "a red circle"], "--prompt must be left out with --mix"),
        (["--steps", "9"], "--steps must be left out with --mix"),
    ],
)
def test_what_the_mix_decides_itself_is_refused_with_a_line(tmp_path, options, text):
    result = CliRunner().invoke(sdtpu, ["demo", "--mix", "--out", str(tmp_path / "out"), *options])
    assert result.exit_code == 1
    assert re.search(text, result.output)
    assert not (tmp_path / "out").exists()


def test_the_ticks_that_jobs_shared_are_counted_from_the_timeline(tmp_path):
    events = [("occupancy", 10 * tick, {}) for tick in range(5)]
    events += [("insert", 11, {"task": "a"}), ("insert", 12, {"task": "b"}), ("decode", 31, {"task": "a"})]
    events += [("decode", 22, {"task": "b"}), ("insert", 30, {"task": "c"}), ("decode", 41, {"task": "c"})]
    lines = [json.dumps({"name": name, "ts": ts, "args": args}) for name, ts, args in events]
    (tmp_path / "timeline.json").write_text("[\n" + ",\n".join(lines) + ",\n{}]\n")
    jobs = {"a": mix.JOBS[0], "b": mix.JOBS[5], "c": mix.JOBS[1]}
    found = mix.count_shared_ticks(tmp_path / "timeline.json", jobs)
    assert found == mix.SharedTicks(ticks=4, jobs=2, kinds=2, settings=1)


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
    children = []
    with contextlib.suppress(OSError):  # it has ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += [int(child) for child in (task / "children").read_text().split()]
    return children + [grandchild for child in children for grandchild in descendants(child)]
