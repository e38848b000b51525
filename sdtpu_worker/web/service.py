"""What every endpoint of the jobs API has at hand: the jobs, the webhooks, and the limits in the settings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from sdtpu_worker.client.live_state import read_live_state
from sdtpu_worker.config import read_setting
from sdtpu_worker.web.jobs import Jobs
from sdtpu_worker.web.live_feed import LiveFeed
from sdtpu_worker.web.problems import Refusal
from sdtpu_worker.web.webhooks import Webhooks

if TYPE_CHECKING:
    from celery import Celery

_STREAMS, _HELD_STREAMS = "sdtpu_http_max_streams", "sdtpu_web_max_streams"


class JobsService:
    """The state of a front of the queue. Belongs to one event loop.

    Args:
        app: the client's Celery app, whose configuration has the settings.
        jobs: of all callers; None to make them.
        page_setting: the setting that says whether this front has the page.

    Attributes:
        jobs: of all callers.
        live: what the queues and workers are at.
        has_page: whether this front has the page.
        open_streams: how many event streams are open.
        stopping: set it to end them.
        webhooks: posts jobs that have ended.
        max_body_bytes: the largest body of a request.

    Raises:
        ConfigurationError: a setting is not allowed, or results or records have no place (`make_client`).
    """

    def __init__(self, app: Celery, jobs: Jobs | None = None, page_setting: str = "sdtpu_web_page") -> None:
        conf = app.conf
        self.jobs = jobs or Jobs(app)
        self.live = LiveFeed(lambda: self.jobs.threads.call(read_live_state, app))
        self.has_page: bool = read_setting(page_setting, conf)
        origins = read_setting("sdtpu_http_webhook_origins", conf)
        self.webhooks = Webhooks(self.jobs, self.jobs.redis, origins, read_setting("sdtpu_http_webhook_secret", conf))
        self.max_body_bytes: int = read_setting("sdtpu_http_max_body_bytes", conf)
        self._max_streams: dict[str, int] = {name: read_setting(name, conf) for name in (_STREAMS, _HELD_STREAMS)}
        self.open_streams, self.stopping = 0, asyncio.Event()

    def take_stream_place(self, holds_thread: bool = False) -> Callable[[], None]:
        """Take one of the places for open streams; return what gives it back.

        Args:
            holds_thread: whether the stream holds a thread of a web server.

        Raises:
            Refusal: 503, all of them are taken.
        """
        setting = _HELD_STREAMS if holds_thread else _STREAMS
        if self.open_streams >= self._max_streams[setting]:
            raise Refusal(
                503, "TooManyStreams", f"{self.open_streams:,} event streams are open, and {setting} allows no more;"
                " ask for the job's state instead",
                headers={"Retry-After": "5"},
            )  # fmt: skip
        self.open_streams += 1
        return self._release_stream

    async def close(self) -> None:
        """End the event streams, and close the connections."""
        self.stopping.set()
        await self.webhooks.close()
        await self.live.close()
        await self.jobs.close()

    def _release_stream(self) -> None:
        self.open_streams -= 1
