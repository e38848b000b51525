"""The ready-made Celery app: `celery -A sdtpu_worker.app worker`.

Configured by a module `celeryconfig` on the path, if there is one (the project's top level has it), by the
environment (`CELERY_BROKER_URL`, `CELERY_RESULT_BACKEND`, `SDTPU_*`), else by these defaults.
"""

from __future__ import annotations

import importlib.util

from celery import Celery

from sdtpu_worker.contract.queues import DEFAULT_QUEUE
from sdtpu_worker.plugin import install, set_defaults

app = Celery("sdtpu_worker")
set_defaults(
    app,
    {
        "broker_url": "redis://localhost:6379/0",
        "result_backend": "redis://localhost:6379/0",
        "task_default_queue": DEFAULT_QUEUE,
    },
)
if importlib.util.find_spec("celeryconfig") is not None:
    app.config_from_object("celeryconfig")
install(app)
