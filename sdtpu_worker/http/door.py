"""What every endpoint of the door has at hand: the jobs, the callers, and the limits in the settings."""

from __future__ import annotations

import time
from pathlib import PurePath
from typing import TYPE_CHECKING

from starlette.requests import Request

from sdtpu_worker.config import read_setting
from sdtpu_worker.http.callers import Callers
from sdtpu_worker.http.queue_page import QueuePage
from sdtpu_worker.web.service import JobsService

if TYPE_CHECKING:
    from celery import Celery


class Door(JobsService):
    """The state of the ASGI app. Belongs to one event loop.

    Args:
        app: the client's Celery app, whose configuration has the settings.

    Attributes:
        callers: finds the caller of a request.
        queue_page: the figures of `/metrics`.
        model: the name of the checkpoint, as clients see it: of a folder or a file its last part only.
        wait_s: seconds that a request waits for its pictures.
        started_at: seconds since 1970.

    Raises:
        ConfigurationError: a setting is not allowed, or results or records have no place (`make_client`).
    """

    def __init__(self, app: Celery) -> None:
        conf = app.conf
        super().__init__(app, page_setting="sdtpu_http_page")
        self.callers = Callers(
            read_setting("sdtpu_http_keys", conf),
            read_setting("sdtpu_http_open", conf),
            read_setting("sdtpu_http_metrics_keys", conf),
        )
        self.queue_page = QueuePage(app, self.jobs.threads)
        self.wait_s: float = read_setting("sdtpu_http_wait_s", conf)
        model: str = read_setting("sdtpu_model", conf)
        self.model = PurePath(model).name if model.startswith(("/", ".", "~")) else model
        self.started_at = int(time.time())


def door_of(request: Request) -> Door:
    """Return the door that a request came to."""
    door: Door = request.app.state.door
    return door
