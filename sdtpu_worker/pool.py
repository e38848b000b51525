"""The Celery pool that holds the devices: a thread per job in flight, two batches of jobs."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from celery.concurrency.thread import TaskPool
from celery.platforms import EX_FAILURE
from celery.worker import state

from sdtpu_worker.config import read_config
from sdtpu_worker.errors import SdtpuError
from sdtpu_worker.serving import Serving, start_serving, stop_serving
from sdtpu_worker.storage import make_image_store

logger = logging.getLogger(__name__)


class DevicePool(TaskPool):
    """Starts and warms the engine before the worker consumes; drains its jobs when the worker stops.

    The number of threads is two batches (twice the slots), whatever `--concurrency` says, so that the next batch
    gathers and the last one is encoded and stored while the devices work.
    """

    serving: Serving | None = None

    def on_start(self) -> None:
        """Make the engine ready; a `ConfigurationError` ends the worker with one line and a failure code."""
        try:
            config = read_config(self.app.conf)
            self.serving = start_serving(config, make_image_store(self.app, config.image_store), _stop_worker)
        except SdtpuError as exc:
            logger.critical("%s: %s", type(exc).__name__, exc)
            raise SystemExit(EX_FAILURE) from exc
        self.limit = self.serving.capacity
        self.executor = ThreadPoolExecutor(self.limit, thread_name_prefix="sdtpu-job")

    def on_stop(self) -> None:
        """Finish the jobs in flight, then stop the engine."""
        super().on_stop()
        stop_serving()

    def _get_info(self) -> dict[str, Any]:
        info = dict(super()._get_info())
        if self.serving is not None:
            engine = self.serving.engine
            info["sdtpu"] = {
                "devices": engine.num_devices,
                "device_kind": engine.device_kind,
                "slots": engine.num_slots,
                "model": engine.checkpoint.name,
                "trace_s": round(engine.trace_s, 3),
                "compile_s": round(engine.compile_s, 3),
                "compile_cache": {"hits": engine.cache_hits, "misses": engine.cache_misses},
                "loop": self.serving.loop.stats.to_json(),
            }
        return info


def _stop_worker() -> None:
    """End the worker with a failure code, for its supervisor to start it anew on a healthy device."""
    state.should_stop = EX_FAILURE
