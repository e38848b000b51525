"""What is special where a web server has a thread for each request: places, threads, forks, connections."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask import Flask

from sdtpu_worker.contrib.flask import JobsBlueprint, create_blueprint
from sdtpu_worker.errors import BrokerUnavailable
from sdtpu_worker.testing import StandInWorker, stand_in_worker
from sdtpu_worker.web.sync_front import SyncFront
from tests.support.clients import client_app
from tests.support.paths import ROOT
from tests.support.waiting import wait_until

NOBODY = "redis://127.0.0.1:1/0"
FORK = """
import os
from celery import Celery
from flask import Flask
from sdtpu_worker import install
from sdtpu_worker.contrib.flask import create_blueprint
from sdtpu_worker.testing import stand_in_worker

app = install(Celery("shop", broker="redis://127.0.0.1:1/0", backend="redis://127.0.0.1:1/0"))
site = Flask(__name__)
site.register_blueprint(create_blueprint(app, owner=lambda: "ann"))

def ask():
    answer = site.test_client().post("/v1/jobs", json={"prompt": "a fox"}, headers={"Prefer": "wait=60"})
    assert answer.json["status"] == "succeeded", answer.json

with stand_in_worker(app):
    ask()
    child = os.fork()
    if not child:
        ask()
        os._exit(7)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    ask()
print("all answered")
"""


@pytest.fixture
def worker():
    with client_app(NOBODY) as app, stand_in_worker(app) as worker:
        worker.holds_jobs = True
        yield worker


@pytest.fixture
def blueprint(worker):
    blueprint = create_blueprint(worker.app, owner=lambda: "ann")
    yield blueprint
    blueprint.close()


@pytest.fixture
def site(blueprint):
    site = Flask(__name__)
    site.register_blueprint(blueprint)
    return site


def post(site: Flask, **headers: str) -> Any:
    return site.test_client().post("/v1/jobs", json={"prompt": "a fox"}, headers=headers)


def open_streams(blueprint: JobsBlueprint) -> int:
    front: SyncFront = blueprint._front
    assert front._running is not None
    return front._running.service.open_streams


def test_a_stream_whose_client_leaves_gives_its_place_back(site, worker, blueprint):
    worker.app.conf.sdtpu_web_max_streams = 1
    place = post(site).json["links"]["events"]
    answer = site.test_client().get(place, buffered=False)
    next(iter(answer.response))
    assert open_streams(blueprint) == 1
    assert site.test_client().get(place).status_code == 503
    answer.close()
    wait_until(lambda: open_streams(blueprint) == 0, "the place to be free")


def test_a_stream_that_is_never_read_gives_its_place_back(site, worker, blueprint):
    place = post(site).json["links"]["events"]
    head = site.test_client().head(place)
    assert (head.status_code, head.mimetype, head.data) == (200, "text/event-stream", b"")
    site.test_client().get(place, buffered=False).close()
    wait_until(lambda: open_streams(blueprint) == 0, "the places to be free")


def test_a_stream_that_outlives_its_front_ends(site, worker, blueprint):
    answer = site.test_client().get(post(site).json["links"]["events"], buffered=False)
    next(iter(answer.response))
    blueprint.close()
    answer.close()


def test_a_request_that_would_wait_is_answered_at_once_where_no_place_is_left(site, worker):
    worker.app.conf.sdtpu_web_max_streams = 1
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(post, site, Prefer="wait=60")
        wait_until(lambda: len(worker.jobs) == 1, "the first job to be sent")
        began = time.monotonic()
        second = post(site, Prefer="wait=60")
        assert time.monotonic() - began < 30
        assert (second.status_code, "Preference-Applied" in second.headers) == (202, False)
        worker.jobs[0].finish()
        assert waiting.result(60).json["status"] == "succeeded"
    worker.jobs[1].finish()
    third = post(site, Prefer="wait=1")
    assert third.headers["Preference-Applied"] == "wait=1"


def test_celery_is_called_in_the_thread_of_the_request(site, worker, monkeypatch):
    seen: list[threading.Thread] = []
    send = StandInWorker.send

    def note(self: StandInWorker, *args: Any, **kwargs: Any) -> Any:
        seen.append(threading.current_thread())
        return send(self, *args, **kwargs)

    monkeypatch.setattr(StandInWorker, "send", note)
    assert post(site).status_code == 202
    assert seen == [threading.current_thread()]


def test_a_job_that_may_have_been_sent_is_withdrawn_after_its_request(site, worker, monkeypatch):
    send = StandInWorker.send

    def send_and_break(self: StandInWorker, *args: Any, **kwargs: Any) -> Any:
        send(self, *args, **kwargs)
        raise OSError("the connection broke")

    monkeypatch.setattr(StandInWorker, "send", send_and_break)
    assert post(site).json["code"] == "RedisUnavailable"
    wait_until(lambda: worker.jobs[0].has_ended, "the job to be cancelled")
    wait_until(lambda: site.test_client().get("/v1/jobs").json["jobs"] == [], "its record to be removed")


def test_a_broker_that_is_away_is_503_without_its_address(site, worker):
    worker.refuse_next(BrokerUnavailable("redis://10.0.0.7 does not answer"))
    answer = post(site)
    assert (answer.status_code, answer.json["code"]) == (503, "BrokerUnavailable")
    assert "10.0.0.7" not in answer.text


def test_a_front_that_was_closed_opens_again(site, worker, blueprint):
    job = post(site).json
    blueprint.close()
    blueprint.close()
    assert site.test_client().get(job["links"]["self"]).json["id"] == job["id"]


def test_a_process_that_was_forked_has_an_event_loop_of_its_own():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, check=False)  # fmt: skip
    assert done.stdout.strip() == "all answered", done.stderr
