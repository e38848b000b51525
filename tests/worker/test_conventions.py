"""What Celery's users take for granted of a task holds for `sdtpu.generate`, or is refused well and at once."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery.contrib.testing.worker import start_worker

from sdtpu_worker import EngineUnavailable, InvalidRequest, generate, open_image
from sdtpu_worker.testing import stand_in
from tests.support.clients import client_app
from tests.support.logs import logging_kept


@pytest.fixture(autouse=True)
def app() -> Iterator[Celery]:
    """Give an app on the broker in memory, which is one for all apps of the process: empty before and after."""
    with client_app("memory://", "cache+memory://") as app:
        drain(app, *QUEUES)
        yield app
        drain(app, *QUEUES)


QUEUES = ("sdtpu", "sdtpu.t10", "celery", "web", "gpu", "art", "mine")


def drain(app: Celery, *queues: str) -> list[Any]:
    """Take the messages in these queues of the broker in memory."""
    messages = []
    with app.connection_for_read() as connection:
        for queue in queues:
            simple = connection.SimpleQueue(queue)
            while True:
                try:
                    message = simple.get(block=False)
                except simple.Empty:
                    break
                message.ack()
                messages.append(message)
    return messages


def sent(app: Celery, goes_to: str, **options: Any) -> dict[str, Any]:
    """Send a job and return what Celery sent: its headers and properties, from the queue in which it must be."""
    generate.apply_async(("a fox",), {"seed": 1, **options.pop("kwargs", {})}, **options)
    (message,) = drain(app, goes_to)
    return {**message.headers, **message.properties}


@pytest.mark.parametrize(
    ("conf", "queue", "priority"),
    [
        ({}, "sdtpu", 6),
        ({"sdtpu_queue": "art", "task_default_priority": 4}, "art", 4),
        ({"task_routes": {"sdtpu.generate": {"queue": "gpu", "priority": 2}}}, "gpu", 2),
        ({"task_routes": {"sdtpu.*": "gpu"}}, "gpu", 6),
        ({"task_routes": [lambda name, *_, **__: "gpu" if name == "sdtpu.generate" else None]}, "gpu", 6),
        ({"task_routes": {"*": {"queue": "web", "priority": 1}}}, "sdtpu", 1),
        ({"task_annotations": {"sdtpu.generate": {"queue": "gpu", "priority": 3}}}, "gpu", 3),
    ],
)
def test_routes_and_annotations_count_for_delay_and_for_send_task(conf, queue, priority):
    """`delay()` ignored them; `send_task` without a queue went to `celery`, with priority 0 before everybody."""
    with client_app("memory://", "cache+memory://", **conf) as app:
        assert sent(app, queue)["priority"] == priority
        app.send_task("sdtpu.generate", ("a fox",))
        (message,) = drain(app, queue)
        assert message.properties["priority"] == priority
        assert drain(app, "celery", "web", "sdtpu") == []


def test_what_the_caller_names_comes_first_and_a_tenant_has_its_queue_either_way(app):
    app.conf.task_annotations = {"sdtpu.generate": {"priority": 3}}
    assert sent(app, "mine", queue="mine", priority=0)["priority"] == 0
    sent(app, "sdtpu.t10", kwargs={"tenant": "a"})
    app.send_task("sdtpu.generate", ("a fox",), {"tenant": "a"})
    assert len(drain(app, "sdtpu.t10")) == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"priority": "3"}, "priority must be an integer from 0, the most urgent, to 9 (at most 255), got '3'"),
        ({"priority": -1}, "priority must be an integer"),
        ({"priority": 300}, "priority must be an integer"),
        ({"priority": True}, "priority must be an integer"),
        ({"expires": "soon"}, "expires must be a number of seconds up to"),
        ({"expires": math.nan}, "expires must be a number of seconds up to"),
        ({"expires": 1e12}, "expires must be a number of seconds up to"),
        ({"expires": [1]}, "a timedelta, a datetime or an ISO 8601 text, got [1]"),
        ({"countdown": "3"}, "countdown must be a number of seconds"),
        ({"eta": 5}, "eta must be a datetime or an ISO 8601 text, got 5"),
        ({"time_limit": "9"}, "time_limit must be a number of seconds"),
    ],
)
def test_a_wrong_option_is_refused_where_the_job_is_enqueued(app, options, text):
    """Some were refused by the worker, some ended in an AttributeError within Celery."""
    with pytest.raises(InvalidRequest) as caught:
        generate.apply_async(("a fox",), **options)
    assert text in str(caught.value)
    assert drain(app, "sdtpu") == []


def test_durations_may_be_timedeltas(app):
    now = datetime.now(UTC)
    headers = sent(app, "sdtpu", expires=timedelta(hours=1), countdown=timedelta(minutes=1), time_limit=timedelta(0, 9))
    assert timedelta(minutes=59) < datetime.fromisoformat(headers["expires"]) - now < timedelta(minutes=61)
    assert datetime.fromisoformat(headers["eta"]) > now
    assert headers["timelimit"] == [9.0, None]
    with client_app(
        "memory://", "cache+memory://", task_annotations={"sdtpu.generate": {"expires": timedelta(hours=1)}}
    ) as annotated:
        assert datetime.fromisoformat(sent(annotated, "sdtpu")["expires"]) > now


def test_map_starmap_and_chunks_are_refused_with_the_remedy(app):
    """They ended in `'NoneType' object has no attribute 'encode'` on an ordinary worker."""
    for call in (lambda: generate.map(["a"]), lambda: generate.starmap([("a",)]), lambda: generate.chunks([("a",)], 1)):
        with pytest.raises(InvalidRequest, match=r"group\(generate\.s\(prompt\) for prompt in prompts\)"):
            call()


def test_a_direct_call_says_that_it_needs_a_worker(app):
    with pytest.raises(EngineUnavailable, match=r"call generate\.delay"):
        generate("a fox")
    with pytest.raises(EngineUnavailable, match=r"celery\.map"):
        app.tasks["celery.map"](task={"task": "sdtpu.generate", "args": (), "kwargs": {}, "options": {}}, it=["a fox"])


def test_delay_on_commit_waits_for_djangos_transaction(tmp_path):
    """It was missing: the base of the task is not the DjangoTask of the app."""
    code = (
        "import django\n"
        "from django.conf import settings\n"
        "settings.configure(DATABASES={'default': {'ENGINE': 'django.db.backends.sqlite3', 'NAME': ':memory:'}})\n"
        "django.setup()\n"
        "from celery import Celery\n"
        "from django.db import transaction\n"
        "from sdtpu_worker import generate, install\n"
        "install(Celery('shop', broker='memory://', backend='cache+memory://')).conf.task_always_eager = True\n"
        "from sdtpu_worker.testing import stand_in\n"
        "from celery.signals import task_postrun\n"
        "task_postrun.connect(lambda state, **_: print(state), weak=False)\n"
        "with stand_in(), transaction.atomic():\n"
        "    generate.delay_on_commit('a fox')\n"
        "    generate.apply_async_on_commit(('a bear',), priority=3)\n"
        "    print('before')\n"
        "with stand_in():\n"
        "    generate.delay_on_commit('a cat')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["before", "SUCCESS", "SUCCESS", "SUCCESS"]


# The stand-in for web developers' tests.


def test_eager_mode_draws_the_same_small_picture_for_the_same_parameters(app):
    """`task_always_eager` was EngineUnavailable."""
    app.conf.task_always_eager = True
    with stand_in():
        first, again = (generate.delay("a fox", seed=7).get() for _ in range(2))
        other = generate.delay("a bear", seed=7, height=128, width=64, image_format="webp").get()
        assert (first["prompt"], first["seed"], first["num_inference_steps"]) == ("a fox", 7, 50)
        assert open_image(first).tobytes() == open_image(again).tobytes()
        assert open_image(other).size == (64, 128)
        assert open_image(other).resize((64, 64)).tobytes() != open_image(first).tobytes()
        with pytest.raises(InvalidRequest):
            generate.delay("")
    with pytest.raises(EngineUnavailable):
        generate.delay("a fox").get()


def test_celerys_worker_for_tests_takes_jobs_and_what_comes_next(app):
    """The worker of `celery.contrib.pytest` never took a job: it consumes the app's default queue alone."""

    @app.task(shared=False)
    def publish(result: dict[str, Any]) -> str:
        return result["prompt"]

    @app.task(shared=False)
    def sheet(results: list[dict[str, Any]]) -> list[str]:
        return [result["prompt"] for result in results]

    with logging_kept(), stand_in(), start_worker(app, perform_ping_check=False, shutdown_timeout=60):
        assert generate.delay("a fox").get(timeout=60)["model"] == "stand-in"
        assert chain(generate.s("a fox"), publish.s()).delay().get(timeout=60) == "a fox"
        images = group(generate.s("a fox"), generate.s("a bear")).delay().get(timeout=60)
        assert [open_image(image).size for image in images] == [(64, 64)] * 2
        assert chord([generate.s("a"), generate.s("b")])(sheet.s()).get(timeout=60) == ["a", "b"]
