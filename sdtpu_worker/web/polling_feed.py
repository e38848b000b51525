"""The states of jobs whose result backend lives in this process, as in tests: there is nothing to subscribe to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from sdtpu_worker.web.job_state import JobState

_PAUSE_S = 0.02


class PollingWatch:
    """One watcher's view of a job.

    Args:
        read: returns the state as it is now.
    """

    def __init__(self, read: Callable[[], Awaitable[JobState]]) -> None:
        self._read = read
        self._seen: str | None = None

    async def next_state(self, timeout_s: float | None = None) -> JobState | None:
        """Return the newest state as soon as it is another one than the last time; None when the time is over.

        Args:
            timeout_s: seconds; None for no limit.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while (state := await self._read()).token == self._seen:
                    await asyncio.sleep(_PAUSE_S)
        except TimeoutError:
            return None
        self._seen = state.token
        return state


class PollingFeed:
    """Watches jobs by looking at them again and again.

    Args:
        read: returns the state of a job as it is now.
    """

    def __init__(self, read: Callable[[str], Awaitable[JobState]]) -> None:
        self._read = read

    @contextlib.asynccontextmanager
    async def watch(self, job_id: str) -> AsyncIterator[PollingWatch]:
        """Watch a job for the block."""
        yield PollingWatch(lambda: self._read(job_id))

    async def close(self) -> None:
        """Let be: there is no connection."""
