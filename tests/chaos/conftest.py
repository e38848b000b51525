"""Real worker processes on devices that count, killed and cut off at every point of a job's way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sdtpu_worker.testing.processes import private_redis
from tests.support.clients import app, app_conf

__all__ = ["app", "app_conf"]


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Whether the fault tests should run in full."""
    return bool(request.config.getoption("--long"))


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    """Run a private Redis for one file: what its workers leave behind concerns no other file."""
    with private_redis() as url:
        yield url
