"""What every endpoint of the door has at hand: the jobs, the callers, and the limits in the settings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import PurePath
from typing import TYPE_CHECKING

from starlette.requests import Request

from sdtpu_worker.config import read_setting
from sdtpu_worker.http.callers import Callers
from sdtpu_worker.http.jobs import Jobs
from sdtpu_worker.http.problems import Refusal
from sdtpu_worker.http.queue_page import QueuePage
from sdtpu_worker.http.webhooks import Webhooks

if TYPE_CHECKING:
    from celery import Celery


class Door:
    """The state of the ASGI app. Belongs to one event loop.

    Args:
        app: the client's Celery app, whose configuration has the settings.

    Attributes:
        jobs: of all callers.
        open_streams: how many event streams are open.
        stopping: set it to end them.
        webhooks: posts jobs that have ended.
        callers: finds the caller of a request.
        queue_page: the figures of `/metrics`.
        model: the name of the checkpoint, as clients see it: of a folder or a file its last part only.
        max_body_bytes: the largest body of a request.
        wait_s: seconds that a request waits for its pictures.
        started_at: seconds since 1970.

    Raises:
        ConfigurationError: a setting is not allowed, or the result backend is not Redis.
    """

    def __init__(self, app: Celery) -> None:
        conf = app.conf
        self.jobs = Jobs(app)
        origins = read_setting("sdtpu_http_webhook_origins", conf)
        self.webhooks = Webhooks(self.jobs, self.jobs.redis, origins, read_setting("sdtpu_http_webhook_secret", conf))
        self.callers = Callers(
            read_setting("sdtpu_http_keys", conf),
            read_setting("sdtpu_http_open", conf),
            read_setting("sdtpu_http_metrics_keys", conf),
        )
        self.queue_page = QueuePage(app, self.jobs.threads)
        self.max_body_bytes: int = read_setting("sdtpu_http_max_body_bytes", conf)
        self.wait_s: float = read_setting("sdtpu_http_wait_s", conf)
        self._max_streams: int = read_setting("sdtpu_http_max_streams", conf)
        self.open_streams, self.stopping = 0, asyncio.Event()
        model: str = read_setting("sdtpu_model", conf)
        self.model = PurePath(model).name if model.startswith(("/", ".", "~")) else model
        self.started_at = int(time.time())

    def take_stream_place(self) -> Callable[[], None]:
        """Take one of the places for open streams; return what gives it back.

        Raises:
            Refusal: 503, all of them are taken.
        """
        if self.open_streams >= self._max_streams:
            raise Refusal(
                503, "TooManyStreams", f"{self.open_streams:,} event streams are open, and sdtpu_http_max_streams"
                " allows no more; ask for the job's state instead",
                headers={"Retry-After": "5"},
            )  # fmt: skip
        self.open_streams += 1
        return self._release_stream

    async def close(self) -> None:
        """End the event streams, and close the connections."""
        self.stopping.set()
        await self.webhooks.close()
        await self.jobs.close()

    def _release_stream(self) -> None:
        self.open_streams -= 1


def door_of(request: Request) -> Door:
    """Return the door that a request came to."""
    door: Door = request.app.state.door
    return door
