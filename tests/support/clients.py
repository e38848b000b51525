"""A private Redis, and Celery apps of its clients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, _state

from sdtpu_worker import install
from sdtpu_worker.testing.processes import private_redis


@contextlib.contextmanager
def client_app(broker: str, backend: str = "", **conf: Any) -> Iterator[Celery]:
    """Make a client's app the current one of this thread and the default one of every other thread, for the block.

    Args:
        broker: URL.
        backend: URL of the result backend; the broker by default.
        conf: settings of Celery.
    """
    before = _state._tls.current_app, _state.default_app
    app = install(Celery("test-client", broker=broker, backend=backend or broker, set_as_current=True))
    app.conf.update(conf)
    app.set_default()
    try:
        yield app
    finally:
        if subscribed := getattr(getattr(app.backend, "result_consumer", None), "subscribed_to", None):
            subscribed.clear()  # else results that are forgotten later look for a Redis that is gone
        app.close()
        _state._set_current_app(before[0])
        _state.default_app = before[1]


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """Run a private Redis for the room."""
    with private_redis() as url:
        yield url


@pytest.fixture
def app_conf() -> dict[str, Any]:
    """Give the settings of `app`; a file that needs other ones has a fixture of this name."""
    return {}


@pytest.fixture
def app(redis_url: str, app_conf: dict[str, Any]) -> Iterator[Celery]:
    """Give the app of a client of the room's Redis: the current one, so that `generate.delay` uses it."""
    with client_app(redis_url, **app_conf) as app:
        yield app
