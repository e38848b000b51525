"""A Flask app that makes pictures: the jobs API as a blueprint, and a page that uses it.

Three shells in the repository's top level, after `pip install -e '.[worker,flask]'`:

    redis-server
    celery -A examples.flask_app.celery_app worker --queues sdtpu --loglevel INFO
    flask --app examples.flask_app run

Expect, on any two-core CPU: the worker says that it is ready after about 30 seconds, and

    curl -i -c jar localhost:5000/v1/jobs --json '{"prompt": "a red circle", "seed": 7}'

answers 202 with the job and its `links` at once; `curl -b jar` of `links.self` says queued, running, then succeeded,
and `links.image` is a PNG. The same in a browser: http://localhost:5000/. A parameter that is not allowed is a 400 with
the reason, a Redis that is down a 503. The web process never imports JAX.
"""

from __future__ import annotations

import os

from celery import Celery
from flask import Flask

from sdtpu_worker import install
from sdtpu_worker.contrib.flask import create_blueprint

REDIS_URL = "redis://localhost:6379/0"
PAGE = """<!doctype html>
<title>sdtpu_worker</title>
<form>
  <input name="prompt" size="50" placeholder="a red circle" required>
  <input name="seed" size="10" placeholder="seed">
  <input name="num_inference_steps" size="5" placeholder="steps" type="number">
  <button>Generate</button>
</form>
<p role="status"></p>
<img alt="">
<script>
  const form = document.querySelector("form"), line = document.querySelector("p"), image = document.querySelector("img")
  const ask = async (url, options) => show(await (await fetch(url, options)).json())
  const show = job => {
    const progress = job.progress ? `${job.progress.description}, ${job.progress.percent} %` : job.status
    line.textContent = job.detail || job.error?.detail || progress
    if (job.links?.image) image.src = job.links.image
    if (job.status === "queued" || job.status === "running") setTimeout(ask, 500, job.links.self)
  }
  form.onsubmit = event => {
    event.preventDefault()
    const given = Object.fromEntries([...new FormData(form)].filter(([, value]) => value))
    if (given.num_inference_steps) given.num_inference_steps = Number(given.num_inference_steps)
    const headers = {"Content-Type": "application/json"}
    ask("/v1/jobs", {method: "post", headers, body: JSON.stringify(given)})
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
app.secret_key = os.environ.get("FLASK_SECRET_KEY", "fit for an example only")
app.register_blueprint(create_blueprint(celery_app))


@app.get("/")
def page() -> str:
    return PAGE
