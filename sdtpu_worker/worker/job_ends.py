"""Names for what became of a job in this worker, from what its thread ends with; see `metric_table.OUTCOMES`."""

from __future__ import annotations

from typing import Any

from celery.exceptions import Ignore, Reject, Retry
from celery.exceptions import NotRegistered as UnknownTask

from sdtpu_worker.errors import DeliveryLimitExceeded, InvalidRequest
from sdtpu_worker.worker.job import JobLeft

_REFUSALS = (InvalidRequest, DeliveryLimitExceeded, UnknownTask)
"""Errors of jobs that no device has seen."""


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
