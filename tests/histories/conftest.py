"""A private Redis on a Unix socket, and the package's clocks in the hands of the histories."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import redis

from sdtpu_worker.delivery import deliveries, transport
from sdtpu_worker.testing.processes import private_redis
from tests.histories.actors import Actor
from tests.histories.world import World


@pytest.fixture(scope="session")
def redis_socket() -> Iterator[str]:
    """Run a Redis; give the path of its Unix socket."""
    with tempfile.TemporaryDirectory(prefix="sdtpu-history-") as folder:
        path = str(Path(folder) / "redis.sock")
        with private_redis("--unixsocket", path):
            yield path


@pytest.fixture
def new_world(redis_socket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], World]]:
    """Give what makes a world, in which Redis is empty."""
    clock = SimpleNamespace(
        monotonic=lambda: Actor.current.process.monotonic(),
        time=lambda: Actor.current.process.wall(),
    )
    for module in (transport, deliveries):
        monkeypatch.setattr(module, "time", clock)
    logging.disable(logging.CRITICAL)  # thousands of histories say a lot
    try:
        with redis.Redis(unix_socket_path=redis_socket) as client:
            yield lambda: World(client, redis_socket)
    finally:
        logging.disable(logging.NOTSET)
