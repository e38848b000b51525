"""A job that somebody watches: its newest state, and who waits for the next."""

from __future__ import annotations

import asyncio

from sdtpu_worker.web.job_state import QUEUED, JobState


class Topic:
    """A watched job. A feed's tasks write it, watchers read it; all in one event loop."""

    def __init__(self) -> None:
        self.state, self.version, self.watchers = QUEUED, 0, 0
        self.changed = asyncio.Event()

    def put(self, state: JobState) -> None:
        """Tell the watchers of a state, unless they know it or the job has ended."""
        if self.version and (state.token == self.state.token or self.state.has_ended):
            return
        self.state, self.version = state, self.version + 1
        self.changed.set()
        self.changed = asyncio.Event()


class Watch:
    """One watcher's view of a job; given by a feed."""

    def __init__(self, topic: Topic) -> None:
        self._topic, self._seen = topic, 0

    async def next_state(self, timeout_s: float | None = None) -> JobState | None:
        """Return the newest state as soon as it is another one than the last time; None when the time is over.

        Args:
            timeout_s: seconds; None for no limit.
        """
        topic = self._topic
        if topic.version == self._seen:
            try:
                async with asyncio.timeout(timeout_s):
                    while topic.version == self._seen:
                        await topic.changed.wait()
            except TimeoutError:
                return None
        self._seen = topic.version
        return topic.state
