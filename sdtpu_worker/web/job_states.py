"""Where the states of jobs are read and watched: in Redis, or in a result backend of another kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from sdtpu_worker.redaction import sanitize_url
from sdtpu_worker.web.celery_threads import CeleryThreads
from sdtpu_worker.web.job_state import JobState, read_state, read_state_of
from sdtpu_worker.web.polling_feed import PollingFeed
from sdtpu_worker.web.problems import Refusal
from sdtpu_worker.web.redis_client import make_subscriber_pool
from sdtpu_worker.web.state_feed import StateFeed

if TYPE_CHECKING:
    from celery import Celery

_PAUSE_S, _PAUSE_IN_PROCESS_S = 0.5, 0.02
"""Seconds between two looks into a result backend that tells of no change; the second for one in this process."""


class JobStates(Protocol):
    """The states of jobs. Belongs to one event loop."""

    @property
    def feed(self) -> StateFeed | PollingFeed:
        """What tells of changes."""

    async def read(self, job_ids: Sequence[str]) -> list[JobState]:
        """Return the states of jobs as they are now."""


class RedisStates:
    """States that Celery's Redis backend keeps: read in one command, and published as they change.

    Args:
        app: the client's app, whose result backend is Redis.
        redis: a client of its Redis.
    """

    def __init__(self, app: Celery, redis: Any) -> None:
        self._backend, self._redis = app.backend, redis
        subscribers: Any = make_subscriber_pool(app)  # redis-py's types leave `make_connection` out of some
        self.feed = StateFeed(subscribers.make_connection, redis.mget, self._parse, self._key_of)

    async def read(self, job_ids: Sequence[str]) -> list[JobState]:
        """Return the states of jobs as they are now."""
        return [self._parse(stored) for stored in await self._redis.mget([self._key_of(each) for each in job_ids])]

    def _parse(self, stored: bytes | None) -> JobState:
        return read_state(self._backend, stored)

    def _key_of(self, job_id: str) -> bytes:
        return self._backend.get_key_for_task(job_id)


class BackendStates:
    """States in a result backend of any kind, such as a database: read job by job, in a thread.

    Args:
        app: the client's app, whose result backend keeps results by task id.
        threads: where it is read.
    """

    def __init__(self, app: Celery, threads: CeleryThreads) -> None:
        self._app, self._threads = app, threads
        is_in_this_process = getattr(app.backend, "is_in_this_process", False)
        self.feed = PollingFeed(self.read, _PAUSE_IN_PROCESS_S if is_in_this_process else _PAUSE_S)

    async def read(self, job_ids: Sequence[str]) -> list[JobState]:
        """Return the states of jobs as they are now.

        Raises:
            Refusal: 503, the result backend does not answer.
        """
        return await self._threads.call(self._read, job_ids)

    def _read(self, job_ids: Sequence[str]) -> list[JobState]:
        backend = self._app.backend
        try:
            _drop_stale_connection(backend)
            return [read_state_of(backend, job_id) for job_id in job_ids]
        except Exception as exc:  # each result backend has errors of its own
            raise Refusal(
                503, "ResultsUnavailable", "the states of jobs cannot be read now; try again later",
                headers={"Retry-After": "5"}, hidden=sanitize_url(repr(exc)),
            ) from exc  # fmt: skip


def _drop_stale_connection(backend: Any) -> None:
    """Have Django connect anew where this thread's connection has broken or is too old, as before each request."""
    if type(backend).__module__.startswith("django_celery_results."):
        from django.db import close_old_connections

        close_old_connections()


def make_states(app: Celery, redis: Any, threads: CeleryThreads) -> JobStates:
    """Return where the states of an app's jobs are.

    Args:
        app: the client's app, whose result backend keeps results by task id.
        redis: a client of the Redis that `make_client` finds.
        threads: for what would block the event loop.
    """
    from celery.backends.redis import RedisBackend

    return RedisStates(app, redis) if isinstance(app.backend, RedisBackend) else BackendStates(app, threads)
