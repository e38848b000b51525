"""`install(app)`: the one place that wires everything into a Celery app."""

from __future__ import annotations

import logging
from typing import Any

from celery import Celery, bootsteps

from sdtpu_worker.config import read_setting

logger = logging.getLogger(__name__)

POOL = "sdtpu_worker.pool:DevicePool"
_DEFAULTS = {
    "worker_pool": POOL,
    "worker_prefetch_multiplier": 1,
    "task_serializer": "json",
    "result_serializer": "json",
    "accept_content": ["json"],
    "broker_connection_retry_on_startup": True,
}


def install(app: Celery) -> Celery:
    """Turn a Celery app into one whose worker can serve: the task, the pool, the start-up checks.

    Safe to call in the module that web processes and ordinary workers share: it only sets defaults, which the app's
    own configuration overrides, and imports no JAX. Returns the app.
    """
    import sdtpu_worker.task  # noqa: F401  registers the shared task

    app.add_defaults(_DEFAULTS)
    app.steps["worker"].add(DeviceWorkerStep)
    return app


class DeviceWorkerStep(bootsteps.StartStopStep):
    """Checks a worker before it starts and gives its consumer the pool's capacity."""

    requires = frozenset({"celery.worker.components:Pool"})

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        queue = read_setting("sdtpu_queue", worker.app.conf)
        self.serves = _names_device_pool(worker.pool_cls)
        consumed = worker.app.amqp.queues.consume_from
        if not self.serves:
            if queue in consumed:
                _refuse(
                    f"the queue {queue!r} needs the pool {POOL}, but this worker has"
                    f" {worker.pool_cls.__module__}:{worker.pool_cls.__qualname__}; set worker_pool = {POOL!r}"
                    " (sdtpu_worker.install(app) does, unless your configuration or -P says otherwise), or consume"
                    " other queues with -Q"
                )
            return
        if worker.autoscale:
            _refuse("--autoscale cannot change how many jobs a device holds; leave it out")
        accepted = set(worker.app.conf.accept_content)
        if not accepted <= {"json", "application/json"}:
            _refuse(f"accept_content must be ['json'] for a worker of the queue {queue!r}, got {sorted(accepted)}")
        if queue not in consumed:
            worker.app.amqp.queues.select_add(queue)
            logger.info("consuming the queue %s too", queue)

    def start(self, worker: Any) -> None:
        """Runs after the pool is warm and before the first message is taken."""
        if self.serves:
            worker.concurrency = worker.consumer.initial_prefetch_count = worker.pool.limit
            worker.consumer.prefetch_multiplier = 1


def _names_device_pool(pool_cls: Any) -> bool:
    return f"{pool_cls.__module__}:{pool_cls.__qualname__}" == POOL or any(
        f"{base.__module__}:{base.__qualname__}" == POOL for base in pool_cls.__mro__
    )


def _refuse(reason: str) -> None:
    raise SystemExit(f"sdtpu_worker refuses to start (ConfigurationError): {reason}")
