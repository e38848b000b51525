"""The log of a real worker process: a line for each job, the task's id on every line of a job, text or JSON."""

from __future__ import annotations

import json
import logging
import re
import signal
import time
from collections import defaultdict

import pytest
import redis

from sdtpu_worker import generate
from sdtpu_worker.contract.queues import SENT_AT_HEADER
from sdtpu_worker.operations.log_format import install_log_format, remove_log_format, task_on_lines
from tests.chaos.fleet import Fleet, Ledger, WorkerProcess
from tests.support.logs import logging_kept
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

SECRET = "a prompt that nobody else may read"

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def fleet(redis_url, tmp_path):
    redis.Redis.from_url(redis_url).flushdb()
    with Fleet(redis_url, tmp_path, app="tests.observe.talking_worker", SDTPU_CPU_DEVICES="2") as fleet:
        yield fleet


def run_jobs(worker: WorkerProcess) -> tuple[str, str]:
    """Have a job succeed and one fail; return their ids when the worker has stopped."""
    ledger = Ledger()
    done, failed = ledger.add(1, 12, SECRET), ledger.add(2, 12, "raise")
    ledger.wait(60)
    assert worker.stop() == 0
    return done, failed


def objects(worker: WorkerProcess) -> list[dict]:
    """Return the JSON objects of a log that has nothing else."""
    return [json.loads(line) for line in worker.text().splitlines()]


def test_each_job_has_one_line_that_tells_its_way(fleet, app):
    worker = fleet.start("a")
    done, failed = run_jobs(worker)
    (line,) = re.findall(rf"INFO/MainProcess\] task {done} (.+)", worker.text())
    assert re.fullmatch(
        r"succeeded: waited \d+\.\d\d s, 12 steps in \d+\.\d\d s on device [01] slot 0,"
        r" with [01] neighbours in 2 slots",
        line,
    )
    (line,) = re.findall(rf"INFO/MainProcess\] task {failed} (.+)", worker.text())
    assert re.fullmatch(r"failed \(GenerationFailed\): waited .+", line)


def test_a_job_that_had_no_slot_says_so(fleet, app):
    worker = fleet.start("a")
    job = app.send_task("sdtpu.generate", (SECRET,), {"steps": 1}, queue="sdtpu")
    wait_until(lambda: f"task {job.id} refused (InvalidRequest): waited" in worker.text())
    assert re.search(rf"task {job.id} refused \(InvalidRequest\): waited \d+\.\d\d s, had no slot", worker.text())


def test_a_job_whose_message_is_dead_lettered_has_its_line_too(fleet, app):
    worker = fleet.start("a")
    job = app.send_task("no.such", (SECRET,), queue="sdtpu", headers={SENT_AT_HEADER: time.time() - 60})
    wait_until(lambda: f"task {job.id} refused (NotRegistered): waited" in worker.text(), worker.text)
    assert re.search(rf"task {job.id} refused \(NotRegistered\): waited [67]\d\.\d\d s, had no slot", worker.text())
    assert re.search(rf"in the queue sdtpu was dead-lettered \(task {job.id}\): task must be one of", worker.text())
    redis.Redis.from_url(fleet.redis_url).lpush("sdtpu", b"no message")
    wait_until(lambda: "in the queue sdtpu was dead-lettered (no usable id): " in worker.text(), worker.text)
    assert SECRET not in worker.text()


def test_json_lines_of_a_job_whose_message_is_dead_lettered_have_its_id(fleet, app):
    worker = fleet.start("a", SDTPU_LOG_FORMAT="json")
    app.send_task("no.such", (SECRET,), queue="sdtpu", task_id="order 66", ignore_result=True)
    wait_until(lambda: "order 66 refused" in worker.text(), worker.text)
    said = [line for line in objects(worker) if line.get("task_id") == "order 66"]
    assert [(line["level"], line["task_name"]) for line in said] == [("WARNING", "no.such"), ("INFO", "no.such")]
    assert (said[1]["job"]["outcome"], said[1]["job"]["reason"]) == ("refused", "NotRegistered")


def test_lines_of_a_jobs_code_name_the_task_and_no_prompt(fleet, app):
    worker = fleet.start("a")
    done, failed = run_jobs(worker)
    said = [line for line in worker.text().splitlines() if "a line of a job's code" in line]
    assert {match for line in said for match in re.findall(r" \[task ([\w-]+)\]$", line)} == {done, failed}
    assert len(said) == 2
    assert "[task" not in next(line for line in worker.text().splitlines() if "ready: " in line)
    assert SECRET not in worker.text()


def test_json_has_an_object_a_line_with_the_facts_of_each_jobs_end(fleet, app):
    worker = fleet.start("a", SDTPU_LOG_FORMAT="json")
    done, failed = run_jobs(worker)
    lines = objects(worker)
    ends = {line["task_id"]: line for line in lines if "job" in line}
    assert set(ends) == {done, failed}
    job = ends[done]["job"]
    assert (job["outcome"], job["steps"], job["slot"], job["slots"]) == ("succeeded", 12, 0, 2)
    assert job["device"] in (0, 1)
    assert job["waited_s"] >= 0 < job["device_s"]
    assert ends[failed]["job"]["reason"] == "GenerationFailed"
    assert ends[done]["task_name"] == "sdtpu.generate"
    assert {line["task_id"] for line in lines if "a line of a job's code" in line["message"]} == {done, failed}
    assert any("GenerationFailed" in line.get("error", "") for line in lines if line.get("task_id") == failed)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}\.\d{3}Z", line["time"]) for line in lines)
    assert "worker: Warm shutdown (MainProcess)" in [line["message"] for line in lines]
    assert SECRET not in worker.text()


def test_what_a_worker_says_before_its_log_is_set_up_and_past_it_is_json_too(fleet, tmp_path, monkeypatch):
    (tmp_path / "warns_early.py").write_text(
        "import warnings\n"
        "from celery import signals\n"
        "from tests.observe.talking_worker import app\n"
        "@signals.celeryd_init.connect(weak=False)\n"
        "def warn(**_):\n"
        "    warnings.warn('as of a worker that runs as root', UserWarning)\n"
    )
    monkeypatch.setattr(fleet, "app", "warns_early")
    worker = fleet.start("a", SDTPU_LOG_FORMAT="json", PYTHONPATH=f"{tmp_path}:{ROOT}")
    worker.send(signal.SIGINT)
    worker.send(signal.SIGQUIT)
    assert worker.process.wait(60) == 0
    lines = [(line["logger"], line["message"]) for line in objects(worker)]
    assert ["as of a worker that runs as root" in text for name, text in lines if name == "py.warnings"].count(
        True
    ) == 1
    assert [text for name, text in lines if name == "celery.apps.worker" and "shutdown" in text]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("SDTPU_IMAGE_STORE", "ConfigurationError: sdtpu_image_store must be"),
        ("SDTPU_LEASE_S", "sdtpu_worker refuses to start (ConfigurationError): SDTPU_LEASE_S must be"),
        (
            "CELERY_RESULT_BACKEND",
            "sdtpu_worker refuses to start (ConfigurationError): the result backend cannot be made",
        ),
    ],
)
def test_the_reason_of_a_start_that_fails_is_a_json_line(fleet, setting, message):
    worker = fleet.launch("a", SDTPU_LOG_FORMAT="json", **{setting: "nonesuch://x"})
    assert worker.process.wait(60) == 1
    last = objects(worker)[-1]
    assert last["level"] == "CRITICAL"
    assert last["message"].startswith(message)


def test_json_lines_of_celery_about_a_job_name_it_too(fleet, app):
    worker = fleet.start("a", SDTPU_LOG_FORMAT="json")
    running = generate.apply_async((SECRET,), {"seed": 1, "num_inference_steps": 1000}).id
    wait_until(lambda: generate.AsyncResult(running).state != "PENDING", "the job to run")
    app.control.revoke(running, terminate=True)
    first, second = (generate.apply_async((SECRET,), {"seed": 1, "num_inference_steps": 3}).id for _ in range(2))
    Ledger({first: (generate.AsyncResult(first), 1, 3), second: (generate.AsyncResult(second), 1, 3)}).wait(60)
    app.control.revoke(first)
    app.control.revoke([first, second])
    wait_until(lambda: worker.text().count("Tasks flagged as revoked") == 2, worker.text)
    by_logger = defaultdict(list)
    for line in objects(worker):
        by_logger[line["logger"]].append((line.get("task_id"), line.get("task_name")))
    assert by_logger["celery.worker.strategy"] == [(job, "sdtpu.generate") for job in (running, first, second)]
    of_control = [task_id for task_id, _ in by_logger["celery.worker.control"]]
    assert of_control == [running, first, None], "the last line is about two"


def test_a_json_line_names_no_task_for_a_uuid_within_a_name(capsys):
    uuid = "4c1e2b06-9d0b-4ffb-8e7a-2c1d9a3f5b60"
    with logging_kept():
        handler = logging.StreamHandler()
        logging.getLogger().addHandler(handler)
        install_log_format("json")
        for text in ("GPU-{}", "{}.png", "{}.reply.celery.pidbox", "{} and 5{}", "of {}", "[{}]", "{}."):
            logging.warning(text.format(uuid, uuid[1:]))
        remove_log_format()
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line.get("task_id") for line in lines] == [None] * 4 + [uuid] * 3


def test_a_value_that_is_no_format_ends_the_start_with_one_line(fleet):
    worker = fleet.launch("a", SDTPU_LOG_FORMAT="xml")
    worker.process.wait(60)
    assert "SDTPU_LOG_FORMAT must be one of text, json, got 'xml'" in worker.text()


def test_the_format_is_taken_off_as_it_was_put_on(capsys):
    with logging_kept():
        logger, handler = logging.getLogger(), logging.StreamHandler()
        plain = logging.Formatter("%(message)s")
        handler.setFormatter(plain)
        logger.addHandler(handler)
        install_log_format("json")
        install_log_format("text")
        with task_on_lines("an-id", "a-task"):
            logging.warning("first\nsecond")
            logging.warning("an-id is in it")
        logging.warning("outside")
        remove_log_format()
        assert handler.formatter is plain
    assert capsys.readouterr().err.splitlines()[-4:] == [
        "first [task an-id]", "second", "an-id is in it", "outside",
    ]  # fmt: skip


def test_a_job_of_a_tenant_is_logged_as_any_other(fleet, app):
    worker = fleet.start("a")
    job = generate.apply_async(("x",), {"tenant": "acme", "seed": 1, "num_inference_steps": 3})
    wait_until(lambda: f"task {job.id} succeeded: waited" in worker.text())
    assert "acme" not in worker.text()
