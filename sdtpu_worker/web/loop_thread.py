"""An event loop in a thread of its own, for web servers that answer each request in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs an event loop until it is closed. Any thread may use it; it ends with its process."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sdtpu-web", daemon=True)
        self._thread.start()

    @property
    def is_open(self) -> bool:
        """Whether it takes work."""
        return not self._loop.is_closed()

    def begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Have the loop do some work, in the caller's context; return what it will be done with."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Cancel what the loop still does, end it, and wait for its thread."""
        self.begin(_cancel_all_others()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_all_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
