"""Streams of events as web frameworks take them: they come from the event loop of the jobs API."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as NotYet

from sdtpu_worker.web.exchange import EventAnswer
from sdtpu_worker.web.loop_thread import LoopThread


class _Events:
    """The events of an answer; whatever happens, `close` gives their place back, once.

    Args:
        loop: in which the events are made.
        answer: the answer.
    """

    def __init__(self, loop: LoopThread, answer: EventAnswer) -> None:
        self._loop, self._answer = loop, answer
        self._following: Future[bytes | None] | None = None
        self._is_closed = False

    def close(self) -> None:
        """End the stream."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._loop.is_open:
            if self._following is not None:
                self._following.cancel()
            self._loop.begin(_end(self._answer))

    def _ask(self) -> Future[bytes | None]:
        self._following = self._loop.begin(_next(self._answer.events))
        return self._following


class EventIterator(_Events):
    """The events of an answer for a thread of a server.

    Args:
        loop: in which the events are made.
        answer: the answer.
        most_s: seconds after which it ends: the thread must be free again, and its client comes back.
    """

    def __init__(self, loop: LoopThread, answer: EventAnswer, most_s: float) -> None:
        super().__init__(loop, answer)
        self._until = time.monotonic() + most_s

    def __iter__(self) -> EventIterator:
        return self

    def __next__(self) -> bytes:
        try:
            event = None if self._is_closed else self._ask().result(max(0.0, self._until - time.monotonic()))
        except (NotYet, CancelledError):  # its time is over, or the front has closed
            event = None
        except BaseException:
            self.close()
            raise
        if event is None:
            self.close()
            raise StopIteration
        return event


class AsyncEventIterator(_Events):
    """The events of an answer for the event loop of a server: no thread is held."""

    def __aiter__(self) -> AsyncEventIterator:
        return self

    async def __anext__(self) -> bytes:
        try:
            event = None if self._is_closed else await asyncio.wrap_future(self._ask())
        except BaseException:
            self.close()
            raise
        if event is None:
            self.close()
            raise StopAsyncIteration
        return event


async def _next(events: AsyncGenerator[bytes, None]) -> bytes | None:
    return await anext(events, None)


async def _end(answer: EventAnswer) -> None:
    """Close a stream's generator, once the step that was under way has seen that it is cancelled."""
    try:
        while True:
            try:
                await answer.events.aclose()
                return
            except RuntimeError:  # it is still running
                await asyncio.sleep(0)
    finally:
        answer.on_end()
