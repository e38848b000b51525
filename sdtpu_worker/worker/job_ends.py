"""The ways in which a job leaves this worker, and their names in the log and the metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery.exceptions import Ignore, Reject, Retry
from celery.exceptions import NotRegistered as UnknownTask

from sdtpu_worker.errors import DeliveryLimitExceeded, InvalidRequest

_REFUSALS = (InvalidRequest, DeliveryLimitExceeded, UnknownTask)
"""Errors of jobs that no device has seen."""


class JobLeft(BaseException):
    """Ends a task's code whose job ends in another way than with a result or an error of its own.

    Celery's tracer makes no state of what is no `Exception`. It sends `task_postrun` with the state None, as when
    Celery itself kills a task, and stores, logs and announces nothing. (`celery.exceptions.Ignore` is no such end:
    `task_postrun` has the state IGNORED then, and listeners store it.) The job's end comes after that.

    Args:
        end: brings the job to its end, outside the tracer.
        outcome, reason: what that end is, as in `operations.metric_table.OUTCOMES`.
    """

    def __init__(self, end: Callable[[], None], outcome: str, reason: str = "") -> None:
        super().__init__()
        self.end, self.outcome, self.reason = end, outcome, reason


def end_of(result: Any) -> tuple[str, str]:
    """Return the outcome of a job and its reason.

    Args:
        result: a `JobLeft`, or what Celery's tracer returns: whether the task failed, its result or its
            `ExceptionInfo`, and its run time.
    """
    if isinstance(result, JobLeft):
        return result.outcome, result.reason
    failed, value, _ = result
    if not failed:
        return "succeeded", ""
    error = value.exception
    error = getattr(error, "exc", error) if type(error).__name__ == "ExceptionWithTraceback" else error
    if isinstance(error, Retry):
        return "retried", type(error.exc).__name__ if error.exc is not None else ""
    if isinstance(error, Ignore | Reject):  # raised by a signal's receiver or an annotation of the app
        return "revoked", type(error).__name__
    if isinstance(error, _REFUSALS):
        return "refused", type(error).__name__
    return "failed", type(error).__name__
