"""Cancels a job: `revoke`, and its end stored at once, so that whoever waits for it need not wait for a worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
        Exception: the broker or the result backend does not answer; each has errors of its own.
    """
    from celery.exceptions import TaskRevokedError

    backend = app.backend
    if _has_ended(app, task_id):
        return
    app.control.revoke(task_id, terminate=True)
    if not _has_ended(app, task_id):
        backend.store_result(task_id, TaskRevokedError(REASON), "REVOKED")


def _has_ended(app: Celery, task_id: str) -> bool:
    backend = app.backend
    stored = backend.get(backend.get_key_for_task(task_id))
    meta = None if stored is None else backend.decode(stored)
    return isinstance(meta, dict) and meta.get("status") in backend.READY_STATES
