"""How long a client waits for a result backend that is down while it enqueues a job."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from sdtpu_worker.client.broker_errors import unavailable

if TYPE_CHECKING:
    from celery import Celery

PATIENCE_S = 3.0
"""Seconds that a client waits for a result backend that is down; Celery alone would try 20 times, for 19 s."""


@contextlib.contextmanager
def bounded_wait(app: Celery) -> Iterator[None]:
    """Let the calling thread wait at most about `PATIENCE_S` for a Redis result backend while it enqueues.

    Celery subscribes to a job's result before it sends the job, and retries that for a long time. Other threads keep
    Celery's patience, and so does a thread that waits for a result. An app whose `result_backend_transport_options`
    have a `retry_policy` keeps that policy.

    Raises:
        BrokerUnavailable: the result backend is a database that is away, which cannot even be looked for.
    """
    try:
        backend = app.backend
    except Exception as exc:  # each kind has errors of its own
        raise unavailable(app, exc, at_backend=True) from exc
    has_own_policy = "retry_policy" in (app.conf.result_backend_transport_options or {})
    if has_own_policy or not hasattr(backend, "on_connection_error"):
        yield
        return
    with _attach_limit(backend).limit(PATIENCE_S):
        yield


class RetryLimit:
    """Replaces a backend's `on_connection_error`: ends the retries of threads whose time is over. Any thread.

    Args:
        on_connection_error: the backend's own method, which says how long to pause before the next try.
    """

    def __init__(self, on_connection_error: Callable[..., float]) -> None:
        self._on_connection_error = on_connection_error
        self._thread = threading.local()

    @contextlib.contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """End the calling thread's retries after this time, and at once where the password is wrong."""
        self._thread.retry_until = time.monotonic() + seconds
        try:
            yield
        finally:
            self._thread.retry_until = None

    def __call__(self, max_retries: int | None, exc: Exception, *rest: Any) -> float:
        """Return the seconds to pause before the next try.

        Raises:
            Exception: `exc`, where the calling thread is not to try again.
        """
        retry_until = getattr(self._thread, "retry_until", None)
        is_refused = any(cls.__name__ == "AuthenticationError" for cls in type(exc).__mro__)
        if retry_until is not None and (is_refused or time.monotonic() >= retry_until):
            raise exc
        return self._on_connection_error(max_retries, exc, *rest)


def _attach_limit(backend: Any) -> RetryLimit:
    """Return the backend's `RetryLimit`; the first call for a backend attaches one."""
    attached = vars(backend).get("on_connection_error")
    if not isinstance(attached, RetryLimit):
        attached = backend.on_connection_error = RetryLimit(backend.on_connection_error)
    return attached
