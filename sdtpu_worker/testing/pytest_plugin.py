"""Fixtures for pytest: `pytest_plugins = ["sdtpu_worker.testing.pytest_plugin"]` in the top `conftest.py`.

They load no JAX and need no Redis. With pytest-django the Celery app is the project's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from sdtpu_worker.testing.no_queue import StandInWorker
from sdtpu_worker.testing.no_queue import stand_in_worker as _stand_in_worker

if TYPE_CHECKING:
    from celery import Celery


@pytest.fixture
def stand_in_app() -> Celery | None:
    """Give the Celery app whose jobs the stand-in takes: None for the current one. Have a fixture of this name."""
    return None


@pytest.fixture
def stand_in_worker(stand_in_app: Celery | None) -> Iterator[StandInWorker]:
    """Take every job of the app, without a queue and a device; see `sdtpu_worker.testing.StandInWorker`."""
    with _stand_in_worker(stand_in_app) as worker:
        yield worker
