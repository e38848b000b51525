"""The states of jobs as they change, where nothing can be subscribed to: they are read again and again.

One task reads the states of all watched jobs, however many watch them, and rests in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from sdtpu_worker.web.job_state import JobState
from sdtpu_worker.web.watch import Topic, Watch

logger = logging.getLogger(__name__)


class PollingFeed:
    """Watches jobs. Belongs to one event loop.

    Args:
        read: returns the states of some jobs as they are now.
        pause_s: seconds between two readings; a job that is watched from now on is read at once.
    """

    def __init__(self, read: Callable[[Sequence[str]], Awaitable[list[JobState]]], pause_s: float) -> None:
        self._read, self._pause_s = read, pause_s
        self._topics: dict[str, Topic] = {}
        self._new = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def watch(self, job_id: str) -> AsyncIterator[Watch]:
        """Watch a job for the block; its first state is that at the beginning, whatever it is."""
        topic = self._topics.get(job_id)
        if topic is None:
            topic = self._topics[job_id] = Topic()
            self._new.set()
        topic.watchers += 1
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        try:
            yield Watch(topic)
        finally:
            topic.watchers -= 1
            if not topic.watchers:
                del self._topics[job_id]

    async def close(self) -> None:
        """End the reading."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        """Read until nobody watches."""
        is_broken = False
        while self._topics:
            self._new.clear()
            topics = dict(self._topics)
            try:
                for topic, state in zip(topics.values(), await self._read(list(topics)), strict=True):
                    topic.put(state)
                is_broken = False
            except Exception as exc:  # each result backend has errors of its own
                logger.log(logging.DEBUG if is_broken else logging.WARNING,
                           "states of jobs cannot be read for now, trying again: %s", exc.__cause__ or exc)  # fmt: skip
                is_broken = True
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._new.wait(), self._pause_s)
