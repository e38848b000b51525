"""What a user would write first: a plain Celery task that calls the pipeline, one prompt at a time, on one device.

celery -A benchmarks.peers.plain worker -Q peers -P solo
"""

from __future__ import annotations

from typing import Any

from celery import Celery, Task
from celery.signals import worker_init

from benchmarks.peers.pipeline import Pipeline, store_image

app = Celery("peers", set_as_current=False)
app.conf.update(task_default_queue="peers", worker_prefetch_multiplier=1, broker_connection_retry_on_startup=True)
pipeline: Pipeline


@worker_init.connect
def load(**_: Any) -> None:
    """Have every program compiled before the worker consumes."""
    global pipeline
    pipeline = Pipeline(1)
    pipeline.warm()


@app.task(name="peers.generate", bind=True)
def generate(self: Task, prompt: str, seed: int, num_inference_steps: int) -> dict[str, Any]:
    """Generate one image; the result has its key in Redis."""
    batch = pipeline.generate([prompt], [seed], num_inference_steps)
    return batch.result(0, store_image(app.backend.client, self.request.id, batch.images[0]))
