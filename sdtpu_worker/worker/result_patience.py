"""Patience with the result backend: a job that is done waits for a Redis that is away or full, as long as it takes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

from celery.backends.redis import RedisBackend
from redis.exceptions import OutOfMemoryError, ReadOnlyError

from sdtpu_worker.errors import EngineUnavailable

_changing = threading.Lock()


def wait_for_results(backend: Any, give_up: Callable[[], bool]) -> None:
    """Have a result backend try again until it works, in the threads that run jobs.

    The threads of a device worker share one backend. The main thread uses it too, and waits for nothing: its first
    error is raised. Safe to call again for the same backend, and from several threads at once.

    Celery's Redis backend would give up after 20 s, read without a second try, and fail the job whose start a full
    Redis, or a master that has just become a replica, takes no note of. Other backends stay as they are.

    Args:
        backend: the calling thread's.
        give_up: asked before every further try; when it says yes, the call fails with `EngineUnavailable` and the
            job is requeued.
    """
    if isinstance(backend, RedisBackend):
        with _changing:
            if not getattr(backend, "waits_for_results", False):
                _change(backend, give_up)


def _change(backend: Any, give_up: Callable[[], bool]) -> None:
    def check_patience() -> None:
        if threading.current_thread() is threading.main_thread() and (error := sys.exc_info()[1]):
            raise error
        if give_up():
            raise EngineUnavailable("the worker stopped before the result could be stored; the job is requeued")

    policy = {**backend.retry_policy, "max_retries": None, "callback": check_patience}
    read = backend.get
    backend.retry_policy, backend.get = policy, lambda key: backend.ensure(read, (key,))
    backend.waits_for_results = True
    backend.connection_errors = (*backend.connection_errors, OutOfMemoryError, ReadOnlyError)
