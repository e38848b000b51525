"""Eight simulated devices, and what is compiled for them once for all tests of a process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.paths import XLA_CACHE

if TYPE_CHECKING:
    import jax

    from sdtpu_worker.diffusion.cache import CompileCache
    from sdtpu_worker.diffusion.checkpoint import Checkpoint
    from sdtpu_worker.diffusion.engine import Engine


@functools.cache
def _find_devices() -> list[jax.Device]:
    from sdtpu_worker.diffusion.sharding import find_devices

    return find_devices("cpu", 8)


@functools.cache
def _open_cache() -> CompileCache:
    from sdtpu_worker.diffusion.cache import CompileCache

    return CompileCache(XLA_CACHE, keep_programs=False)


@functools.cache
def _load_shipped() -> Checkpoint:
    from sdtpu_worker.diffusion.checkpoint import load_checkpoint

    return load_checkpoint("embedded")


@functools.cache
def _make_engine() -> Engine:
    from sdtpu_worker.diffusion.start import make_warm_engine

    return make_warm_engine(_load_shipped(), _find_devices(), 1, None, _open_cache())


@pytest.fixture(scope="session")
def devices() -> list[jax.Device]:
    """Give eight devices; they must be found before anything else in this process starts a backend of JAX."""
    _open_cache()
    return _find_devices()


@pytest.fixture(scope="session")
def compile_cache(devices: list[jax.Device]) -> CompileCache:
    """Give the folder of compiled programs that outlives the run."""
    return _open_cache()


@pytest.fixture(scope="session")
def shipped(devices: list[jax.Device]) -> Checkpoint:
    """Give the shipped checkpoint in float32."""
    return _load_shipped()


@pytest.fixture(scope="session")
def engine(devices: list[jax.Device]) -> Engine:
    """Give the shipped checkpoint on eight devices with one slot each."""
    return _make_engine()


@pytest.fixture(scope="session")
def random_checkpoint(devices: list[jax.Device], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of a tiny epsilon checkpoint of random weights, 8 x 8 pixels, PNDM by default."""
    from tests.support.checkpoints import make_random_checkpoint

    return make_random_checkpoint(tmp_path_factory.mktemp("random") / "checkpoint")


@pytest.fixture(scope="session")
def random_xl_checkpoint(devices: list[jax.Device], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of a tiny XL checkpoint of random weights, 8 x 8 pixels."""
    from tests.support.checkpoints import make_random_checkpoint

    return make_random_checkpoint(tmp_path_factory.mktemp("random-xl") / "checkpoint", xl=True)
