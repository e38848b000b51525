"""The stand-in for the queue: jobs without Redis, and each end that a test can choose."""

from __future__ import annotations

import io

import pytest
from celery import Celery, chain, chord, group
from celery.exceptions import TaskRevokedError, TimeoutError
from PIL import Image

from sdtpu_worker import (
    GenerationFailed,
    InvalidRequest,
    QueueFull,
    generate,
    generate_many,
    image_content_type,
    open_image,
    read_image_bytes,
)
from sdtpu_worker.client.cancel import cancel_job
from sdtpu_worker.testing import stand_in_worker
from tests.support.clients import client_app

NOBODY = "redis://127.0.0.1:1/0"
"""Where no Redis is: whatever asks it fails."""


@pytest.fixture
def app():
    with client_app(NOBODY) as app:
        yield app


@pytest.fixture
def worker(app):
    with stand_in_worker() as worker:
        yield worker


def test_a_job_is_done_at_once_with_a_picture_that_follows_from_the_request(app, worker):
    job, again, other = generate.delay("a fox", seed=7), generate.delay("a fox", seed=7), generate.delay("a bear")
    assert (job.state, job.get()["prompt"], job.get()["seed"]) == ("SUCCESS", "a fox", 7)
    assert read_image_bytes(job.get()) == read_image_bytes(again.get())
    assert open_image(job.get()).tobytes() != open_image(other.get()).tobytes()
    assert image_content_type(job.get()) == "image/png"
    assert app.AsyncResult(job.id).state == "SUCCESS"
    assert app.AsyncResult("another").state == "PENDING"
    assert [each.parameters["prompt"] for each in worker.jobs] == ["a fox", "a fox", "a bear"]


def test_the_options_of_a_job_can_be_looked_at(worker):
    generate.apply_async(("a fox",), {"tenant": "ann"}, priority=3, expires=60)
    (job,) = worker.jobs
    assert (job.options["priority"], job.options["expires"]) == (3, 60)
    assert job.parameters["tenant"] == "ann"


def test_a_wrong_parameter_is_refused_and_enqueues_nothing(worker):
    with pytest.raises(InvalidRequest, match="prompt must not be empty"):
        generate.delay(" ")
    assert worker.jobs == []


def test_the_next_job_is_refused_and_the_one_after_it_is_not(worker):
    worker.refuse_next(QueueFull("100 jobs wait", 12.0))
    with pytest.raises(QueueFull) as refused:
        generate.delay("a fox")
    assert refused.value.eta_s == 12.0
    assert generate.delay("a fox").state == "SUCCESS"


@pytest.mark.parametrize("error", [GenerationFailed("the device failed"), InvalidRequest("height must be 512")])
def test_the_next_job_fails_as_its_client_sees_it(worker, error):
    worker.fail_next(error)
    job = generate.delay("a fox")
    assert job.state == "FAILURE"
    with pytest.raises(type(error), match=str(error)):
        job.get()
    assert generate.delay("a fox").state == "SUCCESS"


def test_the_next_job_expires(worker):
    worker.expire_next()
    job = generate.apply_async(("a fox",), expires=1)
    assert job.state == "REVOKED"
    with pytest.raises(TaskRevokedError, match="expired"):
        job.get()


def test_a_job_that_is_held_shows_the_progress_that_the_test_gives_it(app, worker):
    worker.holds_jobs = True
    job = generate.delay("a fox", num_inference_steps=40)
    (held,) = worker.jobs
    assert job.state == "PENDING"
    with pytest.raises(TimeoutError):
        job.get(timeout=0.01, interval=0.01)
    held.progress(25)
    assert (job.state, job.info["current"], job.info["total"], job.info["percent"]) == ("PROGRESS", 10, 40, 25)
    held.progress(50, preview=b"\x89PNG")
    assert job.info["preview"] == "data:image/png;base64,iVBORw=="
    held.finish()
    assert job.get()["prompt"] == "a fox"
    with pytest.raises(RuntimeError, match="has ended already: it is SUCCESS"):
        held.fail(GenerationFailed("too late"))


def test_a_slow_job_grows_and_ends_when_it_is_looked_at(worker):
    worker.slow_next(600)
    job = generate.delay("a fox")
    assert job.state == "PROGRESS"
    assert 0 <= job.info["percent"] < 100
    worker.jobs[0].take(0.2)
    assert job.get(timeout=60, interval=0.05)["prompt"] == "a fox"


@pytest.mark.parametrize("revoke", [lambda app, job: job.revoke(), lambda app, job: cancel_job(app, job.id),
                                    lambda app, job: app.control.revoke([job.id], terminate=True)])  # fmt: skip
def test_a_job_that_waits_can_be_revoked_and_one_that_is_done_cannot(app, worker, revoke):
    done = generate.delay("a fox")
    worker.holds_jobs = True
    job = generate.delay("a bear")
    for each in (job, done):
        revoke(app, each)
    assert (job.state, done.state) == ("REVOKED", "SUCCESS")


def test_a_key_gives_the_same_job_once_more(worker):
    first = generate.delay("a fox", idempotency_key="order-17")
    assert generate.delay("a fox", idempotency_key="order-17").id == first.id
    with pytest.raises(InvalidRequest, match="idempotency_key must be a new one"):
        generate.delay("a bear", idempotency_key="order-17")
    assert len(worker.jobs) == 1


def test_a_job_may_start_from_a_picture(worker):
    png = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(png, "PNG")
    first = generate.delay("a fox", seed=1, image=png.getvalue(), strength=0.5)
    assert first.state == "SUCCESS"
    second = generate.delay("a fox", seed=1, image=first.get()["image"]["uri"], strength=0.5)
    assert open_image(second.get()).tobytes() != open_image(first.get()).tobytes()


def test_several_pictures_are_a_group(worker):
    results = generate_many("a fox", 3, seed=5).get(timeout=60)
    assert [result["seed"] for result in results] == [5, 6, 7]


def add_tasks(app: Celery) -> tuple:
    @app.task(shared=False, name="publish")
    def publish(result):
        return result["prompt"] if isinstance(result, dict) else [each["prompt"] for each in result]

    @app.task(shared=False, name="upper")
    def upper(text):
        return text.upper()

    return publish, upper


def test_in_eager_mode_what_follows_a_job_runs_too(app, worker):
    publish, upper = add_tasks(app)
    app.conf.task_always_eager = True
    assert generate.delay("a fox").get()["prompt"] == "a fox"
    assert chain(generate.s("a fox"), publish.s(), upper.s()).delay().get() == "A FOX"
    assert chord([generate.s("a"), generate.s("b")])(publish.s()).get() == ["a", "b"]
    assert [each["prompt"] for each in group(generate.s("a"), generate.s("b")).delay().get()] == ["a", "b"]
    assert len(worker.jobs) == 6


def test_in_eager_mode_jobs_fail_and_are_refused_as_planned(app, worker):
    publish, _ = add_tasks(app)
    app.conf.task_always_eager = True
    worker.fail_next(GenerationFailed("the device failed"))
    with pytest.raises(GenerationFailed, match="the device failed"):
        chain(generate.s("a fox"), publish.s()).delay()
    worker.slow_next(60)
    assert chain(generate.s("a fox"), publish.s()).delay().get() == "a fox"
    worker.expire_next()
    group(generate.s("a fox")).delay()
    assert worker.jobs[-1].result.state == "REVOKED"
    app.conf.task_eager_propagates = True
    worker.fail_next(GenerationFailed("the device failed"))
    with pytest.raises(GenerationFailed):
        generate.delay("a fox")
    worker.refuse_next(QueueFull("full"))
    with pytest.raises(QueueFull):
        generate.delay("a fox")


def test_what_follows_a_job_runs_when_it_ends(app, worker):
    publish, upper = add_tasks(app)
    seen = []

    @app.task(shared=False, name="note")
    def note(what):
        seen.append(what["prompt"] if isinstance(what, dict) else what)

    worker.holds_jobs = True
    chained = chain(generate.s("a fox"), publish.s(), upper.s()).delay()
    linked = generate.apply_async(("a bear",), link=note.s())
    failing = generate.apply_async(("a cat",), link_error=note.s())
    assert (seen, chained.state) == ([], "PENDING")
    for job in worker.jobs[:2]:
        job.finish()
    worker.jobs[2].fail(GenerationFailed("the device failed"))
    assert chained.get(timeout=60) == "A FOX"
    assert seen == ["a bear", failing.id]
    assert linked.state == "SUCCESS"
    assert not app.conf.task_always_eager


def test_a_chord_without_eager_mode_says_what_to_do(app, worker):
    publish, _ = add_tasks(app)
    with pytest.raises(NotImplementedError, match="set it in the settings of the tests"):
        generate.apply_async(("a fox",), chord=publish.s())


def test_everything_is_as_before_afterwards(app):
    backend, revoke = app.backend, app.control.revoke
    with stand_in_worker() as worker:
        uri = generate.delay("a fox").get()["image"]["uri"]
        assert app.backend is worker.backend
    assert app.backend is backend
    assert app.control.revoke == revoke
    assert generate.stand_in_worker is None
    from fsspec.implementations.memory import MemoryFileSystem

    assert not [name for name in MemoryFileSystem.store if name in uri]
