"""Shared parts: eight simulated devices, compiled engines for the whole session, a real Redis."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

XLA_CACHE = os.environ.get("SDTPU_TEST_COMPILE_CACHE") or str(Path(tempfile.gettempdir()) / "sdtpu-worker-test-xla")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the fault tests run in full."""
    parser.addoption("--long", action="store_true", help="run tests/chaos in its long form: about an hour")


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Whether the fault tests should run in full."""
    return request.config.getoption("--long")


def pytest_configure() -> None:
    """Choose the devices before any test module starts a backend."""
    from sdtpu_worker.diffusion.cache import CompileCache
    from sdtpu_worker.diffusion.sharding import find_devices

    pytest.compile_cache = CompileCache(XLA_CACHE)
    pytest.devices = find_devices("cpu", 8)


@pytest.fixture(scope="session")
def shipped():
    """Give the shipped checkpoint in float32."""
    from sdtpu_worker.diffusion.checkpoint import load_checkpoint

    return load_checkpoint("embedded")


@pytest.fixture(scope="session")
def engine(shipped):
    """Give the shipped checkpoint on eight devices with one slot each."""
    from sdtpu_worker.diffusion.start import make_warm_engine

    return make_warm_engine(shipped, pytest.devices, 1, None, pytest.compile_cache)


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of a tiny epsilon checkpoint of random weights, 8 x 8 pixels, PNDM by default."""
    from tests.device.checkpoints import make_random_checkpoint

    return make_random_checkpoint(tmp_path_factory.mktemp("random") / "checkpoint")


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """Run a private Redis for the session."""
    from sdtpu_worker.testing.processes import private_redis

    with private_redis() as url:
        yield url
