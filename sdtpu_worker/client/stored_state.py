"""What a result backend keeps of a task, of any kind of backend, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from celery.exceptions import SecurityError
from kombu.exceptions import ContentDisallowed, DecodeError

from sdtpu_worker.client.backend_method import replaced_method
from sdtpu_worker.client.broker_errors import cause_of
from sdtpu_worker.errors import ConfigurationError
from sdtpu_worker.redaction import sanitize_url, without_password

if TYPE_CHECKING:
    from celery import Celery
    from celery.backends.base import Backend

UNREADABLE = (
    DecodeError, ContentDisallowed, SecurityError, TypeError, ValueError, LookupError, AttributeError,
    NotImplementedError,
)  # fmt: skip
"""What a result backend raises for a state that is none, or if it can read none; asking again would not help."""


def keeps_results(backend: Backend) -> bool:
    """Return whether a result backend keeps results by task id, so that any process can read them.

    `rpc://` sends a result to the client that enqueued the job, and without a backend there are none.
    """
    from celery.backends.base import DisabledBackend
    from celery.backends.rpc import RPCBackend

    return not isinstance(backend, DisabledBackend | RPCBackend)


def lasting_backend(app: Celery) -> Backend:
    """Return the calling thread's result backend, which keeps results by task id.

    Args:
        app: the client's app.

    Raises:
        ConfigurationError: it keeps none; or it cannot be made: its package is missing, its database is away.
    """
    try:
        backend: Backend = app.backend
    except Exception as exc:  # each kind has errors of its own, and a database is connected to at once
        raise ConfigurationError(
            "states of jobs cannot be read: the result backend at"
            f" {without_password(app.conf.result_backend)} cannot be used ({cause_of(exc)}); start it, install the"
            " package that it needs, or correct result_backend"
        ) from exc
    if not keeps_results(backend):
        raise ConfigurationError(
            "states of jobs can be read only from a result backend that keeps results by task id, got"
            f" {sanitize_url(repr(app.conf.result_backend))}; set result_backend to redis://…, or to a database"
        )
    return backend


def read_stored(backend: Backend, task_id: str) -> Mapping[str, Any] | None:
    """Return what a result backend keeps of a task: `status`, `result` and more, in Celery's own form.

    The error of a failed task stays the data that it is stored as: no class is looked up.

    Args:
        backend: of this thread; one that keeps results by task id.
        task_id: the task's.

    Returns:
        What is kept; None for nothing.

    Raises:
        Exception: the backend does not answer, or cannot read what it holds; each backend has errors of its own.
    """
    from celery.backends.base import KeyValueStoreBackend

    if isinstance(backend, KeyValueStoreBackend):
        stored = backend.get(backend.get_key_for_task(task_id))
        return None if stored is None else backend.decode(stored)
    with replaced_method(backend, "exception_to_python", lambda stored: stored):
        meta: Mapping[str, Any] = backend.get_task_meta(task_id, cache=False)
    return None if meta["status"] == "PENDING" else meta
