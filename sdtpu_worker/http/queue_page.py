"""The door's `/metrics`: the figures of queues and hosts, read from Redis for whoever scrapes; no worker has to run."""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING

from sdtpu_worker.client.queue_figures import Figures, read_figures
from sdtpu_worker.operations.exposition import expose_queues
from sdtpu_worker.web.celery_threads import CeleryThreads

if TYPE_CHECKING:
    from celery import Celery

_FRESH_S = 1.0


class QueuePage:
    """What `sdtpu metrics` prints, for many scrapers: Redis is read once a second at most, by one thread at a time.

    Belongs to one event loop.

    Args:
        app: the client's app.
        threads: where Redis is read.
    """

    def __init__(self, app: Celery, threads: CeleryThreads) -> None:
        self._app, self._threads = app, threads
        self._reading = asyncio.Lock()
        self._figures: Figures = {}
        self._read_at = -math.inf

    async def read(self, accept: str) -> tuple[str, bytes]:
        """Return the page, with its content type first.

        Args:
            accept: the header `Accept` of the request.

        Raises:
            ConfigurationError: the broker is not Redis.
            BrokerUnavailable: Redis does not answer, or does not allow the door's user to read this.
            Refusal: 503, too many calls wait for a thread.
        """
        async with self._reading:
            if time.monotonic() - self._read_at > _FRESH_S:
                self._figures = await self._threads.call(read_figures, self._app)
                self._read_at = time.monotonic()
            figures = self._figures
        return await self._threads.call(expose_queues, figures, accept)
