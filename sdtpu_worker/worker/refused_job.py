"""The end of a job whose message no task can run: Celery never sees the message, so nothing else ends the job."""

from __future__ import annotations

import logging
from typing import Any

from celery.states import FAILURE

from sdtpu_worker.delivery.envelope import BadEnvelope
from sdtpu_worker.operations.log_format import task_on_lines
from sdtpu_worker.worker.job_record import JobRecord, log_end

logger = logging.getLogger(__name__)


def end_refused_job(bad: BadEnvelope, app: Any, events: Any) -> None:
    """Give a job its error as its result, its line in the log and its event. The worker's main thread.

    It is counted where its message is dead-lettered, as those are that have no usable id.

    Args:
        bad: says what is wrong with the message; it has a usable id.
        app: the Celery app.
        events: Celery's event dispatcher; None while there is none.
    """
    assert bad.task_id is not None
    record = JobRecord.of(bad.task_id, bad.sent_at)
    record.outcome, record.reason = "refused", type(bad.error).__name__
    with task_on_lines(bad.task_id, bad.task_name):
        if not bad.ignore_result:
            _store_error(bad, app)
        log_end(record)
    if events is not None:
        events.send("task-failed", uuid=bad.task_id, exception=repr(bad.error))


def _store_error(bad: BadEnvelope, app: Any) -> None:
    try:
        app.backend.store_result(bad.task_id, bad.error, FAILURE)
    except Exception as exc:  # each result backend has errors of its own
        logger.warning("the error of task %s could not be stored: %s", bad.task_id, exc)
