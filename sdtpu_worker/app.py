"""The ready-made Celery app: `celery -A sdtpu_worker.app worker`.

Configured by a module `celeryconfig` on the path, if there is one (the project's top level has it), by the
environment (`CELERY_BROKER_URL`, `CELERY_RESULT_BACKEND`, `SDTPU_*`), else by these defaults. Its worker is a device
worker and consumes nothing but the queues of `sdtpu.generate`. What comes next in a chain or a chord goes where Celery
sends what has no route: to `task_default_queue`, which an ordinary worker of your own app consumes.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from celery import Celery
from kombu import Exchange, Queue

from sdtpu_worker.config import read_setting
from sdtpu_worker.plugin import POOL, install, set_defaults


def _consume_only_jobs(source: Any, **_: Any) -> None:
    """Make the task's queue the only one that a worker consumes without -Q, unless the configuration names queues."""
    name = read_setting("sdtpu_queue", source)
    source.maps.insert(len(source.maps) - 1, {"task_queues": [Queue(name, Exchange(name), routing_key=name)]})


app = Celery("sdtpu_worker")
set_defaults(
    app,
    {
        "broker_url": "redis://localhost:6379/0",
        "result_backend": "redis://localhost:6379/0",
        "worker_pool": POOL,
    },
)
if importlib.util.find_spec("celeryconfig") is not None:
    app.config_from_object("celeryconfig")
app.on_after_configure.connect(_consume_only_jobs, weak=False)
install(app)
