"""A private Redis on a Unix socket, and the clocks of the package, Celery and kombu in the hands of the histories."""

from __future__ import annotations

import itertools
import logging
import tempfile
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, tzinfo
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import celery.worker.request
import celery.worker.state
import kombu.asynchronous.timer
import kombu.transport
import kombu.transport.redis
import kombu.utils.functional
import pytest

from sdtpu_worker.delivery import deliveries, transport
from sdtpu_worker.testing.processes import private_redis
from sdtpu_worker.worker import job
from tests.histories.actors import Actor
from tests.histories.world import World


def _process() -> Any:
    """Return the worker process whose thread runs now."""
    assert Actor.current is not None
    return Actor.current.process


class _Datetime(datetime):
    """The wall clock of the process that asks."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> _Datetime:
        return cls.fromtimestamp(_process().wall(), tz)


class _Revoked:
    """The tasks that the process which asks takes for revoked: else there is one set for all histories."""

    def __contains__(self, task_id: str) -> bool:
        return task_id in _process().revoked

    def add(self, task_id: str) -> None:
        _process().revoked.add(task_id)


class _Forgetful(dict[Any, Any]):
    """kombu's cache of transports: each process has its own."""

    def __contains__(self, _: object) -> bool:
        return False


_SLICE = 500
"""How many histories are one test."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test of histories its seeds, in slices."""
    if "seeds" not in metafunc.fixturenames:
        return
    option, (few, many) = metafunc.config.getoption, metafunc.module.HISTORIES
    first, end = 0, many if option("--long") else few
    if given := option("--seeds"):
        first, end = map(int, given.split(":"))
    slices = [range(i, min(i + _SLICE, end)) for i in range(first, end, _SLICE)]
    metafunc.parametrize("seeds", slices, ids=[f"{each.start}:{each.stop}" for each in slices])


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
    clock = SimpleNamespace(monotonic=lambda: _process().monotonic(), time=lambda: _process().wall())
    for module in (transport, deliveries, job):
        monkeypatch.setattr(module, "time", clock)
    for module in (kombu.asynchronous.timer, kombu.transport.redis):
        monkeypatch.setattr(module, "monotonic", clock.monotonic)
    monkeypatch.setattr(kombu.utils.functional, "sleep", lambda seconds: _process().sleep(seconds))
    for module in (celery.worker.request, job):
        monkeypatch.setattr(module, "datetime", _Datetime)
    monkeypatch.setattr(celery.worker.request, "revoked_tasks", _Revoked())
    monkeypatch.setattr(celery.worker.state, "revoked", _Revoked())
    monkeypatch.setitem(kombu.transport.TRANSPORT_ALIASES, "redis", lambda: _process().transport)
    monkeypatch.setattr(kombu.transport, "_transport_cache", _Forgetful())
    numbers = itertools.count()

    def make() -> World:
        nonlocal numbers
        numbers = itertools.count()
        return World(redis_socket)

    ids = SimpleNamespace(uuid4=lambda: uuid.UUID(int=next(numbers)))  # Redis sorts by them: a seed must draw them too
    for module in (transport, deliveries):
        monkeypatch.setattr(module, "uuid", ids)
    logging.disable(logging.CRITICAL)  # thousands of histories say a lot
    try:
        yield make
    finally:
        logging.disable(logging.NOTSET)
