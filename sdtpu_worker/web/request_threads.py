"""What blocks is done in the thread of the request that needs it, where a web server has one for each request.

So Celery's client, the web app's database and its context variables are those that the app's own code has there.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import Callable, Coroutine, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

from celery import Celery

from sdtpu_worker.client.backend_method import replaced_method
from sdtpu_worker.web.celery_threads import CeleryThreads
from sdtpu_worker.web.loop_thread import LoopThread

T = TypeVar("T")


class _Inbox:
    """What a request's thread is asked to do. The event loop puts, the thread takes."""

    def __init__(self) -> None:
        self.work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.is_closed = False


_INBOX: ContextVar[_Inbox | None] = ContextVar("sdtpu_inbox", default=None)


class RequestThreads(CeleryThreads):
    """Runs functions in the thread of the request; those that no request waits for in a thread of its own.

    Args:
        app: the client's app.
    """

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """Return what a function returns.

        Raises:
            Exception: what the function raises.
        """
        inbox = _INBOX.get()
        if inbox is None or inbox.is_closed:  # what goes on in the background after its request
            return await super().call(function, *args)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def work() -> None:
            try:
                with without_subscription(self.app):
                    value = function(*args)
            except BaseException as exc:
                loop.call_soon_threadsafe(_settle, done, None, exc)
            else:
                loop.call_soon_threadsafe(_settle, done, value, None)

        inbox.work.put(work)
        return await done


def run_with_request_thread(loop: LoopThread, work: Coroutine[Any, Any, T]) -> T:
    """Return what some work returns that runs in the loop, and whose blocking calls run in this thread.

    Raises:
        Exception: what the work raises.
    """
    inbox = _Inbox()

    async def run() -> T:
        _INBOX.set(inbox)
        try:
            return await work
        finally:
            inbox.is_closed = True

    future = loop.begin(run())
    future.add_done_callback(lambda _: inbox.work.put(None))
    while (call := inbox.work.get()) is not None:
        call()
    return future.result()


@contextlib.contextmanager
def without_subscription(app: Celery) -> Iterator[None]:
    """Have this thread's result backend not subscribe to the jobs that are enqueued in the block.

    Nobody waits for their results in this thread, so nobody would ever read what the subscription brings.
    """
    backend = app.backend
    if backend.thread_safe:
        yield
        return
    with replaced_method(backend, "on_task_call", lambda producer, task_id: None):
        yield


def _settle(done: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
    if done.cancelled():
        return
    if error is None:
        done.set_result(value)
    else:
        done.set_exception(error)
