"""The example web apps as their visitors see them: each in a process of its own, a real Redis, no worker."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from redis import Redis

from sdtpu_worker import GenerationFailed
from sdtpu_worker.contract.result import BatchPlace, GenerationResult, StoredImage, Timings
from sdtpu_worker.images.store import make_image_store
from sdtpu_worker.testing.processes import free_port, private_redis, worker_env
from tests.support.paths import ROOT

FLASK = """
from examples.flask_app import app, celery_app

def visit(method, path, body=b"", content_type="application/json"):
    answer = app.test_client().open(path, method=method, data=body, content_type=content_type)
    return answer.status_code, dict(answer.headers), answer.data
"""
DJANGO = """
import django
from website import celery_app
from django.test import Client

django.setup()

def visit(method, path, body=b"", content_type="application/json"):
    answer = Client(SERVER_NAME="localhost").generic(method, path, body, content_type)
    return answer.status_code, dict(answer.headers), answer.content
"""
VISIT_ALL = """
import json, sys, threading
from sdtpu_worker import generate

celery_app.conf.result_backend_transport_options = {"retry_policy": {"max_retries": 1}}  # else a dead Redis takes 19 s
answers, apps = [], []

def visit_all():
    apps.append(generate.app.main)
    for request in json.loads(sys.argv[1]):
        status, headers, body = visit(**request)
        answers.append((status, headers, body.decode("latin-1")))

thread = threading.Thread(target=visit_all)  # web servers answer in threads, where Celery's current app is another
thread.start()
thread.join()
print(json.dumps({"answers": answers, "own_app": apps == [celery_app.main], "jax": "jax" in sys.modules}))
"""
APPS = {"flask": (FLASK, ROOT), "django": (DJANGO, ROOT / "examples" / "django_project")}

pytestmark = [pytest.mark.timeout(60), pytest.mark.parametrize("framework", APPS)]


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    with private_redis() as url:
        yield url


@pytest.fixture
def own_redis_url(server_url: str) -> str:
    with Redis.from_url(server_url) as client:
        client.flushall()
    return server_url


def visit(framework: str, redis_url: str, *requests: dict[str, Any]) -> list[tuple[int, dict[str, str], bytes]]:
    """Send requests to one process of the app; return each answer's status, headers and body."""
    prelude, folder = APPS[framework]
    run = subprocess.run(
        [sys.executable, "-c", prelude + VISIT_ALL, json.dumps(requests)],
        capture_output=True,
        cwd=folder,
        env=worker_env(redis_url),
        text=True,
        timeout=50,
    )
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout.splitlines()[-1])
    assert len(seen["answers"]) == len(requests), run.stderr
    assert seen["own_app"], "in a thread, the task belongs to another Celery app"
    assert not seen["jax"], "the web process has imported JAX"
    return [(status, headers, body.encode("latin-1")) for status, headers, body in seen["answers"]]


def post(body: Any, content_type: str = "application/json") -> dict[str, str]:
    text = body if isinstance(body, str) else json.dumps(body)
    return {"method": "POST", "path": "/images", "body": text, "content_type": content_type}


def get(path: str) -> dict[str, str]:
    return {"method": "GET", "path": path}


def queued(redis_url: str) -> list[dict[str, Any]]:
    with Redis.from_url(redis_url) as client:
        return [json.loads(message) for key in client.keys("sdtpu*") for message in client.lrange(key, 0, -1)]


def arguments(message: dict[str, Any]) -> dict[str, Any]:
    _, kwargs, _ = json.loads(base64.b64decode(message["body"]))
    return kwargs


def finished(task_id: str) -> GenerationResult:
    return GenerationResult(
        task_id=task_id,
        image=StoredImage(uri=f"redis:sdtpu:image:{task_id}", format="png", width=64, height=64, bytes=4),
        prompt="a fox",
        negative_prompt="",
        seed=7,
        num_inference_steps=4,
        guidance_scale=7.5,
        sampler="pndm",
        model="embedded",
        prompt_truncated=False,
        nsfw_content_detected=None,
        timings=Timings(queued_s=0.0, device_s=1.0, total_s=1.0),
        batch=BatchPlace(device=0, slot=0, occupied=1, num_slots=8),
    )


def test_a_good_prompt_is_one_message_and_202(framework: str, own_redis_url: str) -> None:
    ((status, _, body),) = visit(framework, own_redis_url, post({"prompt": "a fox", "seed": 7}))
    (message,) = queued(own_redis_url)
    task_id = message["headers"]["id"]
    assert status == 202
    assert json.loads(body) == {"task_id": task_id, "status_url": f"/images/{task_id}"}
    assert message["headers"]["task"] == "sdtpu.generate"
    assert arguments(message) == {"prompt": "a fox", "seed": 7}


def test_a_form_has_its_numbers_as_numbers_and_no_empty_fields(framework: str, own_redis_url: str) -> None:
    form = post("prompt=a+fox&seed=&num_inference_steps=20&guidance_scale=5", "application/x-www-form-urlencoded")
    ((status, _, _),) = visit(framework, own_redis_url, form)
    (message,) = queued(own_redis_url)
    sent = arguments(message)
    assert status == 202
    assert isinstance(sent.pop("seed"), int)
    assert sent == {"prompt": "a fox", "num_inference_steps": 20, "guidance_scale": 5.0}


def test_a_bad_parameter_is_400_with_the_reason_and_enqueues_nothing(framework: str, own_redis_url: str) -> None:
    form = "application/x-www-form-urlencoded"
    cases = [
        (post({"prompt": "a fox", "num_inference_steps": 0}), "num_inference_steps must be an integer from 1 to 1000"),
        (post({"prompt": "a fox", "self": 1}), "unknown parameter 'self'"),
        (post({"prompt": ""}), "prompt must not be empty"),
        (post({}), "prompt is missing"),
        (post("[1"), "the body must be a JSON object"),
        (post("[1]"), "the body must be a JSON object"),
        (post("prompt=a+fox&seed=seven", form), "seed must be an integer from 0 to 2**63 - 1, or a string of its"),
    ]
    answers = visit(framework, own_redis_url, *(request for request, _ in cases))
    for (status, _, body), (request, reason) in zip(answers, cases, strict=True):
        assert status == 400, request
        assert reason in json.loads(body)["error"]
    assert queued(own_redis_url) == []


def test_an_unknown_id_is_pending_and_has_no_image(framework: str, own_redis_url: str) -> None:
    task_id = str(uuid.uuid4())
    state, image = visit(framework, own_redis_url, get(f"/images/{task_id}"), get(f"/images/{task_id}/image"))
    assert state[0] == 200
    assert json.loads(state[2]) == {"task_id": task_id, "state": "PENDING", "status_url": f"/images/{task_id}"}
    assert image[0] == 404
    assert json.loads(image[2])["error"] == "no image yet: the job is PENDING"


def test_a_finished_job_shows_its_image_until_it_expires(framework: str, own_redis_url: str) -> None:
    there, gone = str(uuid.uuid4()), str(uuid.uuid4())
    with Celery(broker=own_redis_url, backend=own_redis_url, set_as_current=False) as app:
        for task_id in (there, gone):
            app.backend.store_result(task_id, finished(task_id).to_json(), "SUCCESS")
        make_image_store(app, "redis").put(there, "png", b"\x89PNG")
    state, image, expired = visit(
        framework, own_redis_url, get(f"/images/{there}"), get(f"/images/{there}/image"), get(f"/images/{gone}/image")
    )
    assert json.loads(state[2]) == {
        "task_id": there,
        "state": "SUCCESS",
        "status_url": f"/images/{there}",
        "image_url": f"/images/{there}/image",
        "result": finished(there).to_json(),
    }
    assert (image[0], image[1]["Content-Type"], image[2]) == (200, "image/png", b"\x89PNG")
    assert image[1]["X-Content-Type-Options"] == "nosniff"
    assert expired[0] == 404
    assert "expired" in json.loads(expired[2])["error"]


def test_a_forged_result_is_never_served_as_anything_but_a_picture(framework: str, own_redis_url: str) -> None:
    forgeries: dict[str, dict[str, Any]] = {
        "a script in the site's name": {"format": "svg+xml"},
        "a list for a format": {"format": ["png"]},
        "another task's image": {"uri": "redis:sdtpu:image:other"},
        "a key that is no image": {"uri": "redis:celery-task-meta-other"},
        "a file system made of the result": {"uri": "reference::data:application/json;base64,e30=/x.png"},
        "a number": {"uri": 7},
        "too large a number": {"width": 10**400},
    }
    task_ids = {str(uuid.uuid4()): forged for forged in forgeries.values()}
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    with Celery(broker=own_redis_url, backend=own_redis_url, set_as_current=False) as app:
        for task_id, forged in task_ids.items():
            result: dict[str, Any] = finished(task_id).to_json()
            app.backend.store_result(task_id, {**result, "image": {**result["image"], **forged}}, "SUCCESS")
            make_image_store(app, "redis").put(task_id, "png", svg)
        make_image_store(app, "redis").put("other", "png", b"another's")
        app.backend.store_result(no_result := str(uuid.uuid4()), ["no", "result"], "SUCCESS")
    answers = visit(framework, own_redis_url, *(get(f"/images/{task_id}/image") for task_id in [*task_ids, no_result]))
    for (status, headers, body), about in zip(answers, [*forgeries, "no result"], strict=True):
        assert status == 404, about
        assert headers["Content-Type"] == "application/json", about
        assert "error" in json.loads(body), about


def test_a_running_job_shows_its_progress(framework: str, own_redis_url: str) -> None:
    task_id, progress = str(uuid.uuid4()), {"current": 12, "total": 30, "percent": 40, "pending": False}
    with Celery(broker=own_redis_url, backend=own_redis_url, set_as_current=False) as app:
        app.backend.store_result(task_id, progress, "PROGRESS")
    ((status, _, body),) = visit(framework, own_redis_url, get(f"/images/{task_id}"))
    assert status == 200
    assert json.loads(body)["progress"] == progress


def test_a_failed_job_shows_why(framework: str, own_redis_url: str) -> None:
    task_id = str(uuid.uuid4())
    with Celery(broker=own_redis_url, backend=own_redis_url, set_as_current=False) as app:
        app.backend.store_result(task_id, GenerationFailed("the device failed"), "FAILURE")
    ((status, _, body),) = visit(framework, own_redis_url, get(f"/images/{task_id}"))
    assert status == 200
    assert json.loads(body)["state"] == "FAILURE"
    assert json.loads(body)["error"] == "the device failed"


def test_a_redis_that_is_down_is_503(framework: str) -> None:
    nobody = f"redis://127.0.0.1:{free_port()}/0"
    answers = visit(framework, nobody, post({"prompt": "a fox"}), get(f"/images/{uuid.uuid4()}"))
    assert [status for status, _, _ in answers] == [503, 503]
    assert "cannot be reached" in json.loads(answers[0][2])["error"]
