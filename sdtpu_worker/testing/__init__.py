"""Stand-ins for tests of code that uses this package; they need neither JAX nor a device.

`stand_in` is for tests of a web app. `sdtpu_worker.testing.processes` starts a private Redis and a worker.
"""

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

__all__ = ["FakeDeviceLost", "FakeEngine", "FakeImage", "FakeJob", "FakeSnapshot", "FakeTick", "stand_in"]


def __getattr__(name: str) -> Any:
    if name != "stand_in":  # on first use: it is the only one that needs Celery
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sdtpu_worker.testing.no_devices import stand_in

    return stand_in
