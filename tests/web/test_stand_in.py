"""The jobs API under the stand-in for the queue, as in the tests of a web app: no Redis, no worker."""

from __future__ import annotations

import re

import pytest
from flask import Flask

from sdtpu_worker import GenerationFailed, QueueFull
from sdtpu_worker.contrib.flask import create_blueprint
from sdtpu_worker.testing import stand_in_worker
from tests.http.doors import read_events
from tests.support.clients import client_app

NOBODY = "redis://127.0.0.1:1/0"


@pytest.fixture
def worker():
    with client_app(NOBODY) as app, stand_in_worker(app) as worker:
        yield worker


@pytest.fixture
def site(worker):
    site = Flask(__name__)
    site.secret_key = "for tests only"
    blueprint = create_blueprint(worker.app)
    site.register_blueprint(blueprint)
    yield site
    blueprint.close()


def test_a_job_goes_from_the_request_to_the_picture(site):
    visitor = site.test_client()
    answer = visitor.post("/v1/jobs", json={"prompt": "a fox", "seed": 7}, headers={"Prefer": "wait=60"})
    assert (answer.status_code, answer.json["status"]) == (200, "succeeded")
    assert visitor.get(answer.json["links"]["image"]).data.startswith(b"\x89PNG")
    assert [job["id"] for job in visitor.get("/v1/jobs").json["jobs"]] == [answer.json["id"]]
    again = [visitor.post("/v1/jobs", json={"prompt": "a fox"}, headers={"Idempotency-Key": "1"}) for _ in range(2)]
    assert again[0].json["id"] == again[1].json["id"]
    stranger = site.test_client()
    assert stranger.get(answer.json["links"]["self"]).status_code == 404
    assert stranger.get("/v1/jobs").json == {"jobs": [], "next": None}


def test_progress_previews_cancel_and_failures_are_those_of_the_test(site, worker):
    visitor = site.test_client()
    worker.holds_jobs = True
    place = visitor.post("/v1/jobs", json={"prompt": "a fox"}).json["links"]["self"]
    (job,) = worker.jobs
    job.progress(40, preview=b"\x89PNG")
    assert visitor.get(place).json["progress"]["percent"] == 40
    assert visitor.delete(place).json["status"] == "cancelled"
    place = visitor.post("/v1/jobs", json={"prompt": "a fox"}).json["links"]["self"]
    worker.jobs[-1].fail(GenerationFailed("the device failed"))
    assert visitor.get(place).json["error"] == {"type": "GenerationFailed", "detail": "the device failed"}
    worker.refuse_next(QueueFull("too many jobs wait", 12.0))
    full = visitor.post("/v1/jobs", json={"prompt": "a fox"})
    assert (full.status_code, full.headers["Retry-After"]) == (429, "12")
    assert len(visitor.get("/v1/jobs").json["jobs"]) == 2


def test_events_of_a_slow_job_come_until_it_is_done(site, worker):
    visitor = site.test_client()
    worker.slow_next(600)
    place = visitor.post("/v1/jobs", json={"prompt": "a fox"}).json["links"]["self"]
    with visitor.get(f"{place}/events", buffered=False) as answer:
        events = read_events(line for part in answer.iter_encoded() for line in part.decode().splitlines())
        assert next(events).name == "progress"
        worker.jobs[0].take(0.3)
        rest = list(events)
    assert {event.name for event in rest} <= {"progress", "done"}
    assert rest[-1].data["status"] == "succeeded"


def test_without_a_secret_key_it_is_said_what_to_do(worker, caplog):
    site = Flask(__name__)
    blueprint = create_blueprint(worker.app)
    site.register_blueprint(blueprint)
    answer = site.test_client().get("/v1/jobs")
    blueprint.close()
    assert (answer.status_code, answer.json["code"]) == (503, "ConfigurationError")
    assert re.search("needs SECRET_KEY: set it, or give create_blueprint an `owner`", caplog.text)
