"""Stand-ins for tests of code that uses this package; they need neither JAX nor a device.

`stand_in_worker` takes the place of the whole queue in tests of a web app, `stand_in` that of the devices alone.
`sdtpu_worker.testing.pytest_plugin` has the first as a fixture. `sdtpu_worker.testing.processes` starts a private Redis
and a worker.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sdtpu_worker.testing.fake_engine import (
    FakeDeviceLost,
    FakeEngine,
    FakeImage,
    FakeJob,
    FakeSnapshot,
    FakeTick,
)

if TYPE_CHECKING:
    from sdtpu_worker.testing.no_devices import stand_in
    from sdtpu_worker.testing.no_queue import StandInWorker, stand_in_worker
    from sdtpu_worker.testing.stand_in_job import StandInJob

_HOMES = {
    "StandInJob": "stand_in_job",
    "StandInWorker": "no_queue",
    "stand_in": "no_devices",
    "stand_in_worker": "no_queue",
}
"""What needs Celery, and is imported on first use."""
__all__ = [
    "FakeDeviceLost",
    "FakeEngine",
    "FakeImage",
    "FakeJob",
    "FakeSnapshot",
    "FakeTick",
    "StandInJob",
    "StandInWorker",
    "stand_in",
    "stand_in_worker",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
