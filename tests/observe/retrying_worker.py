"""The fake worker of tests/chaos, whose task is retried at once when it fails."""

from __future__ import annotations

from celery import signals

from sdtpu_worker.errors import GenerationFailed
from tests.chaos.fake_worker import app

__all__ = ["app"]


@signals.worker_process_init.connect
def retry_at_once(**_: object) -> None:
    """Have Celery retry the task, as an app's `autoretry_for` does."""
    task = app.tasks["sdtpu.generate"]
    run = task.run

    def run_or_retry(*args: object, **kwargs: object) -> object:
        try:
            return run(*args, **kwargs)
        except GenerationFailed as exc:
            raise task.retry(exc=exc, countdown=0, max_retries=1) from exc

    task.run = run_or_retry
