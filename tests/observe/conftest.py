"""What an operator sees of real worker processes, on devices that count: their figures, their log and their traces."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sdtpu_worker.testing.processes import private_redis
from tests.support.clients import app, app_conf

__all__ = ["app", "app_conf"]


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    """Run a private Redis for one file."""
    with private_redis() as url:
        yield url
