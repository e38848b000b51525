"""What a user would write today: `celery-batches` with `FlaxStableDiffusionPipeline`, bucketed by step count.

celery -A benchmarks.peers.batches worker -Q peers -P solo

A buffer is flushed when it has eight jobs, or by its timer, whether or not the devices are free. With the thread pool
a busy device does not hold the timers up: they line up small batches, each padded to eight rows, and the worker falls
behind as soon as the buckets' intervals are shorter than one batch of each. With the solo pool the batch blocks the
timers and the next messages wait in Redis meanwhile, so that batches grow with the load. Mean / p99 in seconds over
360 Poisson arrivals, with a pipeline that sleeps for 0.05 s and 0.0217 s a step instead of computing:

    pool, flush_interval     30 steps, 6/s   30 steps, 8/s   mixed, 6/s   mixed, 8/s
    solo, 0.25 s               1.2 / 1.7       1.1 / 1.7      3.0 / 5.0    4.0 / 6.9
    solo, 1 s                  1.3 / 2.4       1.2 / 2.1      3.1 / 5.9    3.5 / 6.5
    solo, 2 s                  1.3 / 2.7       1.2 / 2.8      2.8 / 5.8    2.8 / 5.4
    solo, 4 s                  1.3 / 3.0       1.2 / 2.1      2.9 / 6.1    2.7 / 6.2
    threads, 2 s               1.3 / 2.4       1.2 / 2.1       11 / 25      8.9 / 21
    threads, 3 s               1.3 / 2.5       1.3 / 2.4      2.5 / 4.6    2.8 / 4.9
    threads, 4 s               1.3 / 2.3       1.2 / 2.2      2.9 / 6.0    3.2 / 6.2

So: the solo pool and 2 s, which need no luck with the speed of the machine.
"""

from __future__ import annotations

import os
from typing import Any

from celery import Celery
from celery.signals import worker_init
from celery_batches import Batches, SimpleRequest

from benchmarks.peers.pipeline import STEP_COUNTS, Pipeline, store_image

BATCH_SIZE = 8
FLUSH_INTERVAL_S = float(os.environ.get("PEERS_FLUSH_INTERVAL_S", "2"))

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
