"""The commands that ask the queue, as a shell runs them, beside a real worker."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdtpu_worker import generate
from sdtpu_worker.commands.terminal_picture import picture_text
from sdtpu_worker.testing.processes import free_port, worker_env
from tests.chaos.pictures import expected_count, shown_count
from tests.http.doors import RUN_SDTPU
from tests.support.waiting import wait_until


class Shell:
    """Runs `sdtpu` with the ready-made app on a Redis."""

    def __init__(self, redis_url: str, folder: Path, **settings: str) -> None:
        self.env, self.folder = worker_env(redis_url, **settings), folder

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RUN_SDTPU, *arguments]
        return subprocess.Popen(
            command, env=self.env, cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def run(self, *arguments: str) -> tuple[int, str, str]:
        with self.start(*arguments) as process:
            out, err = process.communicate(timeout=120)
        return process.returncode, out, err


@pytest.fixture
def shell(redis_url: str, tmp_path: Path) -> Shell:
    return Shell(redis_url, tmp_path)


@pytest.mark.usefixtures("worker")
def test_generate_saves_a_picture_for_each_job(shell, tmp_path):
    code, out, _ = shell.run("generate", "a fox", "a cat", "--n", "2", "--seed", "7", "--steps", "3", "-o", "pictures")
    assert code == 0
    files = [line.split()[0] for line in out.splitlines()]
    counts = [shown_count((tmp_path / file).read_bytes()) for file in files]
    assert counts == [expected_count(seed, 3) for seed in (7, 8, 9, 10)]
    assert sorted(files) == sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "pictures").iterdir())


@pytest.mark.usefixtures("worker")
def test_generate_starts_from_a_file(shell, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    code, out, err = shell.run(
        "generate", "a fox", "--image", "red.png", "--mask-image", "red.png", "--strength", "0.5", "--json"
    )
    assert code == 0, err
    options = json.loads(out)["jobs"][0]["result"]["options"]
    assert options["strength"] == 0.5
    assert set(options) == {"image", "mask_image", "strength"}


@pytest.mark.usefixtures("worker")
def test_generate_says_which_job_failed(shell, tmp_path):
    code, out, _ = shell.run("generate", "a fox", "nan", "--steps", "2", "--format", "jpeg", "--json")
    assert code == 3
    good, bad = json.loads(out)["jobs"]
    assert (good["status"], bad["status"], bad["file"]) == ("succeeded", "failed", None)
    assert Image.open(tmp_path / good["file"]).format == "JPEG"
    assert shell.run("status", good["id"])[0] == 0
    code, out, _ = shell.run("status", bad["id"])
    assert code == 3
    assert "GenerationFailed" in out


@pytest.mark.usefixtures("worker", "app")
def test_status_and_cancel_are_about_any_job(shell):
    job = generate.delay("a fox", num_inference_steps=1000)
    wait_until(lambda: job.state == "PROGRESS", "the job to run")
    code, out, _ = shell.run("status", job.id, "--json")
    assert (code, json.loads(out)["status"]) == (4, "running")
    job.revoke(terminate=True)
    job = generate.delay("a fox", num_inference_steps=1000)  # a new one: a shell that starts slowly may outlast a job
    code, out, _ = shell.run("cancel", job.id)
    assert code == 0
    assert out.startswith(f"{job.id}: cancelled")
    wait_until(lambda: job.state == "REVOKED", "the job to be revoked")


@pytest.mark.usefixtures("worker")
def test_ctrl_c_cancels_what_is_not_done(shell, app):
    def jobs_of(prompt: str) -> list[Any]:  # of an earlier test's the worker may still have some
        active = app.control.inspect(timeout=5, limit=1).active() or {}
        return [job for jobs in active.values() for job in jobs if prompt in str(job["args"])]

    with shell.start("generate", "a fox that nobody waits for", "--steps", "1000", "--json") as process:
        (job,) = wait_until(lambda: jobs_of("a fox that nobody waits for"), "the job to be in the worker")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "cancelled" in err
    assert app.AsyncResult(job["id"]).state == "REVOKED"


def test_queue_says_what_waits_and_for_how_long(redis_url, tmp_path):
    shell = Shell(redis_url, tmp_path, SDTPU_QUEUE="waiting")
    code, out, _ = shell.run("queue", "--json")
    assert (code, json.loads(out)["waiting"], json.loads(out)["oldest_s"]) == (0, 0, None)
    with shell.start("generate", "a fox", "a cat", "--json") as process:
        found = wait_until(lambda: (facts := json.loads(shell.run("queue", "--json")[1]))["waiting"] == 2 and facts)
        assert found["oldest_s"] > 0
        assert found["hosts"] == []
        assert "no host takes jobs" in shell.run("queue")[1]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


@pytest.mark.usefixtures("worker")
def test_queue_shows_the_hosts_and_their_slots(shell):
    facts = wait_until(lambda: (found := json.loads(shell.run("queue", "--json")[1]))["hosts"] and found, "a host")
    assert facts["slots"] == 4
    assert "worker@http" in shell.run("queue")[1]


def test_check_names_what_is_wrong_and_the_remedy(redis_url, tmp_path):
    settings = {"SDTPU_PLATFORM": "cpu", "SDTPU_QUEUE": "checked"}
    code, out, _ = Shell(redis_url, tmp_path, **settings).run("check", "--json")
    checks = {check["name"]: check for check in json.loads(out)["checks"] if check["level"] != "warning"}
    assert code == 0
    assert set(checks) >= {"settings", "broker", "results", "images", "checkpoint", "devices"}
    assert "cpu" in checks["devices"]["detail"]
    away = Shell(f"redis://127.0.0.1:{free_port()}/0", tmp_path, SDTPU_MODEL=str(tmp_path), SDTPU_PLATFORM="cpu")
    code, out, _ = away.run("check")
    assert code == 1
    assert "FAILING broker: " in out
    assert "model_index.json" in out


def assert_one_line(shell: Shell, arguments: str, *words: str) -> None:
    code, out, err = shell.run(*arguments.split())
    assert (code, out, len(err.splitlines())) == (1, "", 1), (arguments, out, err)
    assert [word for word in words if word not in err] == [], (arguments, err)


def test_a_redis_that_is_away_is_one_line(tmp_path):
    url = f"redis://127.0.0.1:{free_port()}"
    shell = Shell(f"{url}/0", tmp_path)
    assert_one_line(shell, "generate fox", "the job was not enqueued", url, "correct broker_url and result_backend")
    assert_one_line(
        shell, "status x", "the state of job x cannot be read", url, "correct broker_url and result_backend"
    )
    for arguments in ("cancel x", "queue", "queues", "metrics"):
        assert_one_line(shell, arguments, "127.0.0.1", "correct broker_url")


def test_a_broker_of_a_kind_that_kombu_does_not_know_is_one_line(tmp_path):
    shell = Shell("reddis://someone:secret@127.0.0.1/0", tmp_path)
    for arguments in ("generate fox", "queue"):
        assert_one_line(shell, arguments, "broker_url must be", "like redis://", "got reddis://someone:**@127.0.0.1/0")


@pytest.mark.parametrize(
    ("kind", "all_arguments", "words"),
    [
        ("db+sqlite", ["status x"], "unable to open database file"),  # Celery asks a database for nine seconds
        ("file", ["status x", "cancel x", "generate fox", "serve --address 127.0.0.1:0"], "make sure that it exists"),
    ],
)
def test_a_result_backend_that_is_away_is_one_line(tmp_path, kind, all_arguments, words):
    place = f"{kind}:///{tmp_path}/no-folder/results"
    shell = Shell(f"redis://127.0.0.1:{free_port()}/0", tmp_path, CELERY_RESULT_BACKEND=place)
    for arguments in all_arguments:
        assert_one_line(shell, arguments, "states of jobs cannot be read", place, words, "correct result_backend")


def test_a_job_that_the_broker_is_not_told_of_is_one_line(tmp_path):
    url, place = f"redis://127.0.0.1:{free_port()}/0", f"db+sqlite:///{tmp_path}/results.sqlite"
    shell = Shell(url, tmp_path, CELERY_RESULT_BACKEND=place)
    assert_one_line(shell, "cancel x", "job x was not cancelled", url, "correct broker_url")


def test_a_result_backend_that_keeps_no_results_is_refused_before_a_job_is_sent(redis_url, tmp_path):
    shell = Shell(redis_url, tmp_path, CELERY_RESULT_BACKEND="rpc://", SDTPU_QUEUE="refused")
    assert_one_line(shell, "generate fox", "keeps results by task id, got 'rpc://'", "set result_backend")
    assert json.loads(shell.run("queue", "--json")[1])["waiting"] == 0


def test_a_wrong_prompt_is_an_error(redis_url, tmp_path):
    code, _, err = Shell(redis_url, tmp_path).run("generate", " ")
    assert (code, "prompt must not be empty" in err) == (1, True)


@pytest.mark.parametrize(
    ("environ", "start"),
    [
        ({"KITTY_WINDOW_ID": "1"}, "\x1b_Gf=100"),
        ({"TERM_PROGRAM": "WezTerm"}, "\x1b]1337;File="),
        ({"COLORTERM": "truecolor"}, "\x1b[38;2;255;0;0;48;2;255;0;0m▀"),
        ({"TERM": "dumb"}, ""),
    ],
)
def test_a_terminal_gets_a_picture_in_its_own_way(tmp_path, environ, start):
    Image.new("RGB", (64, 32), "red").save(tmp_path / "red.png")
    text = picture_text(tmp_path / "red.png", environ)
    assert text.startswith(start)
    assert bool(text) == bool(start)
