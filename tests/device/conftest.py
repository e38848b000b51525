"""JAX on eight simulated devices, in this process; what all files use is compiled once, and kept on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.engine_fixtures import (
    compile_cache,
    devices,
    engine,
    random_checkpoint,
    random_xl_checkpoint,
    shipped,
)

if TYPE_CHECKING:
    import jax

__all__ = ["compile_cache", "devices", "engine", "random_checkpoint", "random_xl_checkpoint", "shipped"]


@pytest.fixture(scope="session", autouse=True)
def found_first(devices: list[jax.Device]) -> None:
    """Find the eight devices before the first test of the room: once a backend runs, their number is fixed."""
