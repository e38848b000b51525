"""Stand-ins for tests of code that uses this package; they need neither JAX nor a device.

`sdtpu_worker.testing.processes` starts a private Redis and a worker.
"""

from sdtpu_worker.testing.fake_engine import (
    FakeDeviceLost,
    FakeEngine,
    FakeImage,
    FakeJob,
    FakeSnapshot,
    FakeTick,
)

__all__ = ["FakeDeviceLost", "FakeEngine", "FakeImage", "FakeJob", "FakeSnapshot", "FakeTick"]
