"""Threads for what blocks: calls of Celery's client, and reading and encoding pictures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from sdtpu_worker.web.problems import Refusal

if TYPE_CHECKING:
    from celery import Celery

T = TypeVar("T")
MOST_THREADS = 8
MOST_WAITING = 256
"""How many calls may wait for a thread."""


class CeleryThreads:
    """Runs functions in a bounded number of threads, which live as long as the door: each has connections of its own.

    Args:
        app: the client's app.
    """

    def __init__(self, app: Celery) -> None:
        self.app, self._pending = app, 0
        self._executor = ThreadPoolExecutor(
            MOST_THREADS, thread_name_prefix="sdtpu-door", initializer=self._enter_thread
        )

    def _enter_thread(self) -> None:
        """Have this thread's result backend not subscribe to each job that the thread enqueues.

        Nobody waits for a result in these threads, so nobody would ever read what the subscription brings.
        """
        backend = self.app.backend
        if not backend.thread_safe:  # else it is shared, and the process may wait for results of its own jobs
            backend.on_task_call = lambda producer, task_id: None

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """Return what a function returns.

        Raises:
            Refusal: 503, too many calls wait for a thread.
            Exception: what the function raises.
        """
        if self._pending >= MOST_THREADS + MOST_WAITING:
            raise Refusal(503, "Busy", "too many requests wait; try again later", headers={"Retry-After": "1"})
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)
        finally:
            self._pending -= 1

    def close(self) -> None:
        """End the threads when they have nothing to do."""
        self._executor.shutdown(wait=False)
