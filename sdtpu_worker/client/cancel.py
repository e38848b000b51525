"""Cancels a job: `revoke`, and its end stored at once, so that whoever waits for it need not wait for a worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdtpu_worker.client.broker_errors import unavailable
from sdtpu_worker.client.stored_state import read_stored

if TYPE_CHECKING:
    from celery import Celery

REASON = "cancelled by its caller"
"""What the stored end of a cancelled job says."""


def cancel_job(app: Celery, task_id: str) -> None:
    """Take a job out of the queue or off its slot; a job that has ended stays as it is.

    A worker that holds the job takes it off at its next tick. One that does not finds it revoked when it gets it.

    Args:
        app: the client's app; its result backend must be one that keeps results by task id.
        task_id: the job's.

    Raises:
        BrokerUnavailable: the broker does not answer.
        Exception: the result backend does not answer; each has errors of its own.
    """
    from celery.exceptions import TaskRevokedError

    backend = app.backend
    if _has_ended(app, task_id):
        return
    try:
        app.control.revoke(task_id, terminate=True)
    except Exception as exc:  # each broker has errors of its own
        raise unavailable(app, exc, failed=f"job {task_id} was not cancelled") from exc
    if not _has_ended(app, task_id):
        backend.store_result(task_id, TaskRevokedError(REASON), "REVOKED")


def _has_ended(app: Celery, task_id: str) -> bool:
    meta = read_stored(app.backend, task_id)
    return isinstance(meta, dict) and meta.get("status") in app.backend.READY_STATES
