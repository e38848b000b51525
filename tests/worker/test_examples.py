"""The example web apps as their visitors see them: each in a process of its own, a real Redis, no worker."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from sdtpu_worker.testing.processes import free_port, private_redis, worker_env
from tests.support.paths import ROOT

FLASK = """
from examples.flask_app import app, celery_app

client = app.test_client()

def visit(method, path, body=b"", content_type="application/json"):
    answer = client.open(path, method=method, data=body, content_type=content_type)
    return answer.status_code, dict(answer.headers), answer.data
"""
DJANGO = """
import django
from website import celery_app
from django.test import Client

django.setup()

from django.core.management import call_command

call_command("migrate", verbosity=0)
call_command("check", fail_level="WARNING")
client = Client(SERVER_NAME="localhost")

def visit(method, path, body=b"", content_type="application/json"):
    answer = client.generic(method, path, body, content_type)
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
        if request["path"] == "the first job":
            request["path"] = json.loads(answers[0][2])["links"]["self"]
        status, headers, body = visit(**request)
        answers.append((status, headers, body.decode("latin-1")))

thread = threading.Thread(target=visit_all)  # web servers answer in threads, where Celery's current app is another
thread.start()
thread.join()
print(json.dumps({"answers": answers, "own_app": apps == [celery_app.main], "jax": "jax" in sys.modules}))
"""
APPS = {"flask": (FLASK, ROOT), "django": (DJANGO, ROOT / "examples" / "django_project")}
FORM = "application/x-www-form-urlencoded"

pytestmark = pytest.mark.timeout(180)
each_framework = pytest.mark.parametrize("framework", APPS)


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    with private_redis() as url:
        yield url


@pytest.fixture
def own_redis_url(server_url: str) -> str:
    with Redis.from_url(server_url) as client:
        client.flushall()
    return server_url


@pytest.fixture
def visit(tmp_path: Path) -> Any:
    """Give a function that sends requests to one process of an app, and returns each answer."""

    def send(framework: str, redis_url: str, *requests: dict[str, Any]) -> list[tuple[int, dict[str, str], bytes]]:
        prelude, folder = APPS[framework]
        run = subprocess.run(
            [sys.executable, "-c", prelude + VISIT_ALL, json.dumps(requests)],
            capture_output=True,
            cwd=folder,
            env=worker_env(redis_url, DJANGO_DATA_DIR=str(tmp_path)),
            text=True,
            timeout=150,
        )
        assert run.returncode == 0, run.stderr
        seen = json.loads(run.stdout.splitlines()[-1])
        assert len(seen["answers"]) == len(requests), run.stderr
        assert seen["own_app"], "in a thread, the task belongs to another Celery app"
        assert not seen["jax"], "the web process has imported JAX"
        return [(status, headers, body.encode("latin-1")) for status, headers, body in seen["answers"]]

    return send


def post(body: Any, path: str = "/v1/jobs", content_type: str = "application/json") -> dict[str, str]:
    text = body if isinstance(body, str) else json.dumps(body)
    return {"method": "POST", "path": path, "body": text, "content_type": content_type}


def get(path: str) -> dict[str, str]:
    return {"method": "GET", "path": path}


def queued(redis_url: str) -> list[dict[str, Any]]:
    with Redis.from_url(redis_url) as client:
        keys = [key for key in client.keys("sdtpu*") if client.type(key) == b"list"]
        return [json.loads(message) for key in keys for message in client.lrange(key, 0, -1)]


def arguments(message: dict[str, Any]) -> dict[str, Any]:
    _, kwargs, _ = json.loads(base64.b64decode(message["body"]))
    return kwargs


@each_framework
def test_a_good_prompt_is_one_message_and_a_job_of_the_visitor(visit, framework, own_redis_url):
    made, shown, listed = visit(framework, own_redis_url, post({"prompt": "a fox", "seed": 7}), get("the first job"),
                                get("/v1/jobs"))  # fmt: skip
    (message,) = queued(own_redis_url)
    task_id = message["headers"]["id"]
    assert made[0] == 202
    assert made[1]["Location"].endswith(f"/v1/jobs/{task_id}")
    assert (shown[0], json.loads(shown[2])["status"]) == (200, "queued")
    assert [job["id"] for job in json.loads(listed[2])["jobs"]] == [task_id]
    assert message["headers"]["task"] == "sdtpu.generate"
    sent = arguments(message)
    assert sent.pop("tenant").startswith("web:session-")
    assert sent == {"prompt": "a fox", "seed": 7}


@each_framework
def test_a_bad_parameter_is_400_with_the_reason_and_enqueues_nothing(visit, framework, own_redis_url):
    cases = [
        (post({"prompt": "a fox", "num_inference_steps": 0}), 400, "num_inference_steps must be an integer from 1"),
        (post({"prompt": "a fox", "self": 1}), 400, "'self' is no field of this request"),
        (post({"prompt": ""}), 400, "prompt must not be empty"),
        (post("[1"), 400, "body must be JSON"),
        (post("prompt=a+fox", content_type=FORM), 415, "must have the type application/json"),
    ]
    answers = visit(framework, own_redis_url, *(request for request, _, _ in cases))
    for (found, _, body), (request, status, reason) in zip(answers, cases, strict=True):
        assert found == status, request
        assert reason in json.loads(body)["detail"]
    assert queued(own_redis_url) == []


@each_framework
def test_a_redis_that_is_down_is_503(visit, framework):
    nobody = f"redis://127.0.0.1:{free_port()}/0"
    ((status, headers, body),) = visit(framework, nobody, post({"prompt": "a fox"}))
    assert (status, json.loads(body)["code"]) == (503, "RedisUnavailable")
    assert headers["Retry-After"]


def test_the_page_of_flask_asks_the_jobs_api(visit, own_redis_url):
    ((status, _, body),) = visit("flask", own_redis_url, get("/"))
    assert status == 200
    assert b'ask("/v1/jobs"' in body


def test_the_page_of_django_has_a_card_for_each_job(visit, own_redis_url):
    sent, page, refused = visit(
        "django", own_redis_url, post("prompt=a+fox&seed=7&num_inference_steps=20", "/", FORM), get("/"),
        post("prompt=+", "/", FORM),
    )  # fmt: skip
    (message,) = queued(own_redis_url)
    assert (sent[0], sent[1]["Location"]) == (302, "/")
    assert f'data-sdtpu-job="/v1/jobs/{message["headers"]["id"]}"'.encode() in page[2]
    assert arguments(message) == {"prompt": "a fox", "seed": "7", "num_inference_steps": 20}
    assert refused[0] == 400
    assert b"prompt must not be empty" in refused[2]
