"""A real Redis, a real worker on a fake engine with previews, and doors as their users start them."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from sdtpu_worker.testing.processes import running, wait_for_line, worker_command, worker_env
from tests.http.doors import DoorProcess, start_door
from tests.support.clients import app, app_conf, redis_url
from tests.support.paths import ROOT

__all__ = ["app", "app_conf", "redis_url"]

STEP_MS = 20
"""A job of 250 steps takes five seconds: its states can be seen on a busy machine too."""


@pytest.fixture(scope="session")
def worker(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run a worker with four slots; a step takes `STEP_MS`."""
    log = tmp_path_factory.mktemp("worker") / "worker.log"
    settings = {"SDTPU_CPU_DEVICES": "2", "SDTPU_SLOTS_PER_DEVICE": "2", "SDTPU_FAKE_STEP_MS": str(STEP_MS),
                "SDTPU_PREVIEW_EVERY": "2", "SDTPU_PROGRESS_S": "0.05", "SDTPU_TICK_S": "0.02"}  # fmt: skip
    command = worker_command("tests.http.preview_worker", "-n", "worker@http")
    with running(command, log, env=worker_env(redis_url, **settings), cwd=ROOT) as process:
        wait_for_line(process, log, " ready.", 120)
        yield


@pytest.fixture(scope="session")
def door(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DoorProcess]:
    """Run a door without keys."""
    with start_door(redis_url, tmp_path_factory.mktemp("door")) as door:
        yield door


@pytest.fixture
def client(door: DoorProcess) -> Iterator[httpx.Client]:
    """Give a client of the door without keys."""
    with door.client() as client:
        yield client
