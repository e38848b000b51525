"""A Flask app that makes pictures: enqueue a prompt, ask for its state, fetch the image.

Three shells in the repository's top level, after `pip install -e '.[worker]' flask`:

    redis-server
    celery -A examples.flask_app.celery_app worker --queues sdtpu --loglevel INFO
    flask --app examples.flask_app run

Expect, on any two-core CPU: the worker says that it is ready after about 30 seconds, and

    curl -i localhost:5000/images --json '{"prompt": "a red circle", "seed": 7}'

answers 202 with `{"task_id": …, "status_url": …}` at once; the status URL says PENDING, STARTED, then SUCCESS with an
`image_url`, a PNG. The same in a browser: http://localhost:5000/. A parameter that is not allowed is a 400 with the
reason, a Redis that is down a 503. The web process never imports JAX.
"""

from __future__ import annotations

import os
from typing import Any

from celery import Celery, states
from flask import Flask, Response, request, url_for
from redis.exceptions import RedisError

from sdtpu_worker import (
    BrokerUnavailable,
    InvalidRequest,
    StorageError,
    generate,
    image_content_type,
    install,
    read_image_bytes,
)

REDIS_URL = "redis://localhost:6379/0"
NUMBERS = {"seed": int, "num_inference_steps": int, "height": int, "width": int, "guidance_scale": float}
PAGE = """<!doctype html>
<title>sdtpu_worker</title>
<form action="/images" method="post">
  <input name="prompt" size="50" placeholder="a red circle" required>
  <input name="seed" size="10" placeholder="seed">
  <input name="num_inference_steps" size="5" placeholder="steps">
  <button>Generate</button>
</form>
<p></p>
<img alt="">
<script>
  const form = document.querySelector("form"), line = document.querySelector("p"), image = document.querySelector("img")
  const show = async (url, options) => {
    const job = await (await fetch(url, options)).json()
    const progress = job.progress ? `${job.progress.description}, ${job.progress.percent} %` : job.state
    line.textContent = job.error || progress || "sent"
    if (job.image_url) image.src = job.image_url
    else if (!job.error) setTimeout(show, 500, job.status_url)
  }
  form.onsubmit = event => {
    event.preventDefault()
    show(form.action, {method: "post", body: new FormData(form)})
  }
</script>
"""

celery_app = install(
    Celery(
        "flask_app",
        broker=os.environ.get("CELERY_BROKER_URL", REDIS_URL),
        backend=os.environ.get("CELERY_RESULT_BACKEND", REDIS_URL),
    )
)
app = Flask(__name__)


@app.get("/")
def page() -> str:
    return PAGE


@app.post("/images")
def create_image() -> tuple[dict[str, Any], int]:
    job = generate.apply_async(kwargs=read_parameters())
    return {"task_id": job.id, "status_url": url_for("image_status", task_id=job.id)}, 202


@app.get("/images/<task_id>")
def image_status(task_id: str) -> dict[str, Any]:
    job = celery_app.backend.get_task_meta(task_id)  # state and result of one moment
    status = {"task_id": task_id, "state": job["status"], "status_url": url_for("image_status", task_id=task_id)}
    if job["status"] == states.SUCCESS:
        return {**status, "image_url": url_for("image", task_id=task_id), "result": job["result"]}
    if job["status"] == "PROGRESS":
        status["progress"] = job["result"]
    elif job["status"] in states.EXCEPTION_STATES:
        status["error"] = str(job["result"])
    return status


@app.get("/images/<task_id>/image")
def image(task_id: str) -> Response | tuple[dict[str, str], int]:
    job = celery_app.AsyncResult(task_id)
    if job.state != states.SUCCESS:
        return {"error": f"no image yet: the job is {job.state}"}, 404
    data, content_type = read_image_bytes(job.result, celery_app), image_content_type(job.result)
    return Response(data, mimetype=content_type, headers={"X-Content-Type-Options": "nosniff"})


@app.errorhandler(InvalidRequest)
def invalid_request(error: InvalidRequest) -> tuple[dict[str, str], int]:
    return {"error": str(error)}, 400


@app.errorhandler(StorageError)
def image_gone(error: StorageError) -> tuple[dict[str, str], int]:
    return {"error": str(error)}, 404


@app.errorhandler(BrokerUnavailable)
@app.errorhandler(RedisError)
def redis_down(error: Exception) -> tuple[dict[str, str], int]:
    return {"error": str(error)}, 503


def read_parameters() -> dict[str, Any]:
    """Return the JSON object, or the form with its numbers as numbers and its empty fields left out.

    What does not look like a number stays text: the package refuses it by name.
    """
    if not request.is_json:
        return {name: as_number(name, text) for name, text in request.form.items() if text}
    parameters = request.get_json(silent=True)
    if not isinstance(parameters, dict):
        raise InvalidRequest('the body must be a JSON object like {"prompt": "a red circle"}')
    return parameters


def as_number(name: str, text: str) -> int | float | str:
    try:
        return NUMBERS[name](text) if name in NUMBERS else text
    except ValueError:
        return text
