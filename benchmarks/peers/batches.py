"""What a user would write today: `celery-batches` with `FlaxStableDiffusionPipeline`, bucketed by step count.

celery -A benchmarks.peers.batches worker -Q peers -P solo

A buffer is flushed when it has eight jobs, or by its timer, whether or not the devices are free. With the thread pool
a busy device does not hold the timers up: they line up small batches, each padded to eight rows, and the worker falls
behind as soon as the interval is shorter than one batch of every bucket. With the solo pool a batch blocks the timers
and the next messages wait in Redis meanwhile, so that batches grow with the load. Mean / p99 in seconds over 360
Poisson arrivals at 60 and 80 % of a limit of 9.8 and 10.7 images/s, with a pipeline that only sleeps for 0.0425 s and
0.025 s a step:

    pool, flush_interval   30 steps, 60 %   30 steps, 80 %   mixed, 60 %   mixed, 80 %
    solo, 1 s                 1.5 / 2.5        1.3 / 2.1      3.5 / 6.6     4.8 / 9.1
    solo, 2 s                 1.5 / 2.9        1.4 / 3.5      3.5 / 6.5     4.5 / 9.3
    solo, 3 s                 1.4 / 2.9        1.4 / 2.4      3.5 / 7.0     3.7 / 7.2
    solo, 4 s                 1.5 / 4.9        1.4 / 2.5      3.3 / 8.3     3.4 / 7.1
    solo, 6 s                 1.4 / 2.6        1.5 / 5.6      3.3 / 8.4     3.5 / 8.0
    threads, 3 s              1.4 / 3.3        1.6 / 2.7      3.5 / 6.2     5.5 / 10
    threads, 4 s              1.5 / 4.6        1.5 / 2.4      3.4 / 6.7     5.5 / 12
    threads, 5 s              1.4 / 2.9        1.5 / 3.6      2.9 / 6.6     4.5 / 8.2
    threads, 6 s              1.5 / 6.3        1.5 / 2.4      3.5 / 7.4     3.4 / 7.3

So: the solo pool and 3 s. With threads, 1 s and a mix of step counts the queue grows without end.
"""

from __future__ import annotations

import os
from typing import Any

from celery import Celery
from celery.signals import worker_init
from celery_batches import Batches, SimpleRequest

from benchmarks.peers.pipeline import STEP_COUNTS, Pipeline, store_image

BATCH_SIZE = 8
FLUSH_INTERVAL_S = float(os.environ.get("PEERS_FLUSH_INTERVAL_S", "3"))

app = Celery("peers", set_as_current=False)
app.conf.update(
    task_default_queue="peers",
    worker_prefetch_multiplier=0,  # no limit, for the buffers to fill
    broker_connection_retry_on_startup=True,
)
pipeline: Pipeline


@worker_init.connect
def load(**_: Any) -> None:
    """Have every program compiled before the worker consumes."""
    global pipeline
    pipeline = Pipeline(BATCH_SIZE)
    pipeline.warm()


def add_task(num_inference_steps: int) -> None:
    """Register the task of one bucket: a program takes one number of steps for the whole batch."""

    @app.task(
        name=f"peers.generate_{num_inference_steps}",
        base=Batches,
        flush_every=BATCH_SIZE,
        flush_interval=FLUSH_INTERVAL_S,
    )
    def generate(requests: list[SimpleRequest]) -> None:
        batch = pipeline.generate(
            [request.kwargs["prompt"] for request in requests],
            [request.kwargs["seed"] for request in requests],
            num_inference_steps,
        )
        for i, request in enumerate(requests):
            uri = store_image(app.backend.client, request.id, batch.images[i])
            app.backend.mark_as_done(request.id, batch.result(i, uri), request=request)


for steps in STEP_COUNTS:
    add_task(steps)
