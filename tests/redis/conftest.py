"""A real Redis for everything that a client or a worker does with it; no worker process, no devices."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis import Redis

from tests.support.clients import app, app_conf, redis_url

__all__ = ["app", "app_conf", "redis_url"]


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    """Give a client of the room's Redis, which is empty before the test and after it."""
    with Redis.from_url(redis_url) as client:
        client.flushdb()
        yield client
        client.flushdb()
