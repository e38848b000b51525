"""The public name of the pool that holds the devices: `worker_pool = "sdtpu_worker.pool:DevicePool"`."""

from sdtpu_worker.worker.pool import DevicePool

__all__ = ["DevicePool"]
