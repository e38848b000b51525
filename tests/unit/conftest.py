"""What can be tested without JAX and without Redis, in seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOM = Path(__file__).parent


@pytest.fixture(autouse=True)
def no_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `import jax` fail as where it is not installed, also if tests of other rooms have loaded it."""
    monkeypatch.setitem(sys.modules, "jax", None)


@pytest.fixture(scope="session", autouse=True)
def room_without_jax(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where this room runs alone, assert at the end that no module has loaded JAX, not even to be collected."""
    runs_alone = all(ROOM in item.path.parents for item in request.session.items)
    yield
    assert not (runs_alone and "jax" in sys.modules), "a module that the unit tests import has loaded JAX"
