"""The jobs API where results are kept in a database: by SQLAlchemy, or by the Django project's own."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from sdtpu_worker import generate
from sdtpu_worker.client.cancel import cancel_job
from sdtpu_worker.contrib.flask import create_blueprint
from sdtpu_worker.errors import ConfigurationError, GenerationFailed
from sdtpu_worker.testing.processes import running, wait_for_line, worker_command, worker_env
from sdtpu_worker.web.job_state import JobState, read_state_of
from sdtpu_worker.web.polling_feed import PollingFeed
from sdtpu_worker.web.redis_client import make_client
from tests.chaos.pictures import expected_count, shown_count
from tests.http.doors import keys, read_events, start_door
from tests.support.clients import client_app
from tests.support.paths import ROOT
from tests.web import django_site
from tests.web.fronts import Front, django_front, door_front, flask_front, make_flask_app

QUEUE = "elsewhere"
WORKERS = {"database": "tests.http.preview_worker", "django": "tests.web.django_worker"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elsewhere")


def backend_url(kind: str, folder: Path) -> str:
    return "django-db" if kind == "django" else f"db+sqlite:///{folder / 'results.sqlite'}"


@pytest.fixture(scope="module", params=list(WORKERS))
def kind(request: pytest.FixtureRequest, redis_url: str, django_project: Path, folder: Path) -> Iterator[str]:
    """Run a worker that keeps its results in a database; give the kind of it."""
    name = request.param
    settings = {"CELERY_RESULT_BACKEND": backend_url(name, folder), "SDTPU_IMAGE_STORE": redis_url,
                "SDTPU_QUEUE": QUEUE, "SDTPU_CPU_DEVICES": "1", "SDTPU_SLOTS_PER_DEVICE": "2",
                "SDTPU_FAKE_STEP_MS": "20", "SDTPU_PREVIEW_EVERY": "5", "SDTPU_PROGRESS_S": "0.2",
                "DJANGO_SITE_FOLDER": str(django_project)}  # fmt: skip
    log = folder / f"{name}.log"
    with running(
        worker_command(WORKERS[name], "-n", f"{name}@elsewhere"), log, env=worker_env(redis_url, **settings), cwd=ROOT
    ) as process:
        wait_for_line(process, log, " ready.", 120)
        yield name


@pytest.fixture
def client(kind: str, redis_url: str, folder: Path) -> Iterator[Celery]:
    """Give the app of a web process with the same backend."""
    conf = {"sdtpu_queue": QUEUE, "sdtpu_image_store": redis_url, "sdtpu_web_owner": "tests.web.django_site.find_owner"}
    with client_app(redis_url, backend_url(kind, folder), **conf) as app:
        yield app


@pytest.fixture(params=["door", "web app"])
def front(
    request: pytest.FixtureRequest,
    kind: str,
    client: Celery,
    redis_url: str,
    folder: Path,
    tmp_path: Path,
    django_project: Path,
) -> Iterator[Front]:
    """Give a front of each kind that has these results: the door, and Flask's or Django's in this process."""
    with contextlib.ExitStack() as stack:
        if request.param == "door":
            settings = {"CELERY_RESULT_BACKEND": backend_url(kind, folder), "SDTPU_IMAGE_STORE": redis_url,
                        "SDTPU_QUEUE": QUEUE, "SDTPU_HTTP_KEYS": keys(ann=""),
                        "DJANGO_SITE_FOLDER": str(django_project)}  # fmt: skip
            app = WORKERS[kind] if kind == "django" else ""
            yield door_front(stack.enter_context(start_door(redis_url, tmp_path, app, **settings)).url, "ann")
        elif kind == "django":
            stack.callback(django_site.forget_connections)
            yield django_front("ann")
        else:
            blueprint = create_blueprint(client, owner=lambda: "ann")
            stack.callback(blueprint.close)
            yield flask_front(make_flask_app(blueprint), "ann")


def enqueue(front: Front, **parameters: Any) -> dict[str, Any]:
    reply = front.post({"prompt": "a fox"} | parameters)
    assert reply.status == 202, reply.body
    return reply.json()


def test_a_job_shows_its_progress_and_gives_its_picture(front):
    job = enqueue(front, seed=7, num_inference_steps=250)
    with front.stream(f"/v1/jobs/{job['id']}/events", {}) as parts:
        events = list(read_events(b"".join(parts).decode().splitlines()))
    assert {"progress", "preview"} <= {event.name for event in events}
    assert events[-1].name == "done"
    assert front.get(f"/v1/jobs/{job['id']}").json()["status"] == "succeeded"
    assert shown_count(front.get(f"/v1/jobs/{job['id']}/image").body) == expected_count(7, 250)
    assert job["id"] in [each["id"] for each in front.get("/v1/jobs").json()["jobs"]]


def test_a_request_can_wait_for_its_picture(front):
    reply = front.post({"prompt": "a fox", "num_inference_steps": 2}, Prefer="wait=60")
    assert (reply.status, reply.json()["status"]) == (200, "succeeded")


def test_a_failed_job_says_why(front):
    job = front.end(enqueue(front, prompt="nan")["id"])
    assert (job["status"], job["error"]["type"]) == ("failed", "GenerationFailed")
    assert front.get(f"/v1/jobs/{job['id']}/image").status == 410


def test_a_job_is_cancelled(front):
    job = enqueue(front, num_inference_steps=1000)
    front.delete(f"/v1/jobs/{job['id']}")
    assert front.end(job["id"])["status"] == "cancelled"


def test_the_error_of_a_job_stays_data(kind, client):
    client.backend.store_result("some-task", GenerationFailed("the device failed"), "FAILURE")
    state = read_state_of(client.backend, "some-task")
    assert (state.status, state.error.type, state.error.detail) == ("failed", "GenerationFailed", "the device failed")
    assert isinstance(client.AsyncResult("some-task").result, GenerationFailed), "as Celery gives it to everybody else"


def test_a_job_that_is_cancelled_before_any_worker_has_it_ends_at_once(kind, client):
    job = generate.apply_async(("a fox",), countdown=60)
    cancel_job(client, job.id)
    assert read_state_of(client.backend, job.id).status == "cancelled"


def test_a_database_that_cannot_be_read_is_said_so(redis_url, tmp_path):
    file = tmp_path / "results.sqlite"
    with client_app(redis_url, f"db+sqlite:///{file}", sdtpu_queue="unread") as app:
        blueprint = create_blueprint(app, owner=lambda: "ann")
        front = flask_front(make_flask_app(blueprint), "ann")
        job = enqueue(front)
        with contextlib.closing(sqlite3.connect(file)) as database:
            database.execute("DROP TABLE celery_taskmeta")
        reply = front.get(f"/v1/jobs/{job['id']}")
        blueprint.close()
    assert (reply.status, reply.json()["code"]) == (503, "ResultsUnavailable")
    assert b"celery_taskmeta" not in reply.body


@pytest.mark.parametrize(
    ("broker", "backend", "words"),
    [
        ("redis://127.0.0.1:1/0", "rpc://", "keeps results by task id, got 'rpc://'"),
        ("redis://127.0.0.1:1/0", "disabled://", "keeps results by task id, got 'disabled://'"),
        ("redis://127.0.0.1:1/0", "cache+memory://", "keeps results by task id, got 'cache[+]memory://'"),
        ("memory://", "db+sqlite://", "keeps its records in Redis.*broker 'memory://'"),
        ("redis://h:1;redis://h:2", "db+sqlite://", "keeps its records in Redis"),
        ("rediss://:secret@h:1", "db+sqlite://", "broker_url cannot be used.*ssl_cert_reqs"),
    ],
)
def test_what_cannot_work_is_refused(broker, backend, words):
    with (
        client_app(broker, backend) as app,
        pytest.raises(ConfigurationError, match=words) as caught,
    ):
        make_client(app)
    assert "secret" not in str(caught.value)


def test_the_records_use_the_options_of_the_broker():
    with client_app("redis://:pw@h:7/3", "db+sqlite://", broker_use_ssl={"ssl_cert_reqs": "required"}) as app:
        pool = make_client(app).connection_pool
    assert pool.connection_class.__name__ == "SSLConnection"
    options = pool.connection_kwargs
    assert (options["host"], options["port"], options["db"], options["password"]) == ("h", 7, 3, "pw")


def watch_with(read: Callable[..., Any], count: int) -> list[list[JobState]]:
    """Return what some watchers of one job see until its end."""

    async def follow(feed: PollingFeed) -> list[JobState]:
        seen = []
        async with feed.watch("job") as watch:
            while not seen or not seen[-1].has_ended:
                seen.append(await watch.next_state(60))
        return seen

    async def run() -> list[list[JobState]]:
        feed = PollingFeed(read, 0.001)
        seen = await asyncio.gather(*(follow(feed) for _ in range(count)))
        await feed.close()
        return seen

    return asyncio.run(run())


def test_one_reading_serves_all_watchers_of_a_job_and_a_failed_one_is_repeated():
    asked = []

    async def read(job_ids):
        asked.append(list(job_ids))
        if len(asked) == 2:
            raise OSError("the database has gone away")
        return [JobState("succeeded" if len(asked) == 5 else "running", token=str(len(asked)))]

    seen = watch_with(read, 50)
    assert all([state.token for state in each] == ["1", "3", "4", "5"] for each in seen)
    assert asked == [["job"]] * 5
